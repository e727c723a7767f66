// Numbers, names, colours and elements that every part of the page uses. The files are put together in one function.
const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const MEASURE_NAMES = { mean: "mean", std: "standard deviation", min: "smallest", max: "largest", p05: "5th percentile",
  p50: "median", p95: "95th percentile", count: "rows" };
const state = { run: 0, stat: 0, group: 0, measure: "mean", less: -1, printing: false, head: null };
const run = () => page.runs[state.run];

const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u1: Uint8Array };

// An array of numbers that Python packed; unpacked when it is first asked for.
function unpack(packed) {
  if (!packed.values) {
    const text = atob(packed.data), bytes = new Uint8Array(text.length);
    for (let place = 0; place < text.length; place += 1) { bytes[place] = text.charCodeAt(place); }
    packed.values = new ARRAYS[packed.type](bytes.buffer);
    packed.data = null;
  }
  return packed.values;
}

// The part of a packed array that its first indices name.
function part(packed, ...indices) {
  let start = 0, size = unpack(packed).length;
  indices.forEach((index, axis) => { size /= packed.shape[axis]; start += index * size; });
  return packed.values.subarray(start, start + size);
}

const gridOf = (of, stat, group, measure) => part(of.numbers, stat, group, page.measures.indexOf(measure));
const known = (value) => Number.isFinite(value);
const groupName = (of, group) => (of.groups[group] === "" ? "all groups together" : of.groups[group]);
const layerName = (of, row) => "layer " + of.layers[row].number;
const headName = (of, row, head) => layerName(of, row) + " head " + head;
const placeOf = (of, row, head) => row * of.width + head;

// As many figures as one reads off a page; whole numbers whole.
function shown(value, figures = 3) {
  if (value === null || !known(value)) { return "–"; }
  if (Number.isInteger(value)) { return value.toLocaleString("en"); }
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) { return value.toExponential(figures - 1); }
  const digits = Math.max(0, figures - 1 - Math.floor(Math.log10(size)));
  return value.toFixed(Math.min(digits, size < 1 ? figures + 1 : digits));
}

// A number on an axis that spans `size`: what is nothing beside it is 0.
const onAxis = (value, size) => shown(Math.abs(value) < 1e-3 * size ? 0 : value, 2);

const signed = (value) => (known(value) && value > 0 ? "+" : "") + shown(value);

// Where a colour scale begins and ends; around 0 where 0 is a middle. The ends are never equal.
function boundsOf(grids, fromZero, middle) {
  let low = Infinity, high = -Infinity;
  grids.forEach((grid) => grid.forEach((value) => {
    if (known(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  }));
  if (low > high) { return middle ? [-1, 1] : [0, 1]; }
  if (middle) { const furthest = Math.max(Math.abs(low), Math.abs(high)) || 1; return [-furthest, furthest]; }
  if (fromZero) { low = Math.min(low, 0); }
  return high > low ? [low, high] : [low, low + 1];
}

const darkQuery = window.matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const theme = document.documentElement.dataset.theme;
  return !state.printing && (theme ? theme === "dark" : darkQuery.matches);
}
const scaleOf = (middle) => page.colours[(middle ? "diverging_" : "") + (isDark() ? "dark" : "light")];

function mixed(scale, share) {
  const place = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
  const index = Math.min(Math.floor(place), scale.length - 2), rest = place - index;
  const channel = (colour, at) => parseInt(colour.slice(at, at + 2), 16);
  const [from, to] = [scale[index], scale[index + 1]];
  return [1, 3, 5].map((at) => Math.round(channel(from, at) * (1 - rest) + channel(to, at) * rest));
}

const colourOf = (value, [low, high], scale) => mixed(scale, (value - low) / (high - low));
const rgb = (colour) => "rgb(" + colour.join(",") + ")";

// Black or white, whichever is read better on a colour.
function inkOn(colour) {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}

// make("p.quiet", { id: "x", onclick: f }, "text", element, ...): text never becomes markup.
function make(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const svg = ["svg", "g", "path", "rect", "circle", "line", "text", "title", "polyline"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (classes.length) { made.setAttribute("class", classes.join(" ")); }
  Object.entries(attributes || {}).forEach(([key, value]) => {
    if (key.startsWith("on")) { made.addEventListener(key.slice(2), value); }
    else if (value === true) { made.setAttribute(key, ""); }
    else if (value !== null && value !== undefined && value !== false) { made.setAttribute(key, value); }
  });
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

/* A table. `columns` are [heading, class] each, "number" for numbers; a row is one list of texts and elements per column,
   the first of which is its heading. */
function tableOf(name, columns, rows) {
  const of = (tag, kind, attributes, content) => make(tag + (kind ? "." + kind : ""), attributes, content);
  return make("table.numbers" + (name ? "." + name : ""), {},
    make("thead", {}, make("tr", {}, columns.map(([heading, kind]) => of("th", kind, { scope: "col" }, heading)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((content, place) =>
      (place ? of("td", columns[place][1], {}, content) : of("th", "", { scope: "row" }, content)))))));
}

const titled = (about) => [about.title, make("span.unit", {}, " " + about.unit)];
const scrolled = (label, table) => make("div.scroll", { tabindex: 0, role: "region", "aria-label": label }, table);

function fill(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text, off]) => make("option", { value: value, disabled: off }, text)));
  select.value = String(chosen);
}

function save(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const csvField = (value) => (/[",\n\r]/.test(value) ? '"' + String(value).replace(/"/g, '""') + '"' : String(value));
const cell = (value) => (typeof value === "number" && !known(value) ? "" : csvField(value));
const saveCsv = (name, header, rows) =>
  save(name, "text/csv", [header, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n");
const saveJson = (name, value) => save(name, "application/json", JSON.stringify(value));

// Every head that a run has: f(row, head).
function eachHead(of, f) {
  of.layers.forEach((layer, row) => { for (let head = 0; head < layer.heads; head += 1) { f(row, head); } });
}
