// A heat map that is a table: read by screen readers, walked with the arrow keys, printed as it is.
const tip = find("tip");

function showTip(text, at) {
  tip.textContent = text;
  tip.hidden = false;
  const box = at.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
  const above = box.top - own.height - 8;
  tip.style.left = left + window.scrollX + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + window.scrollY + "px";
}
const hideTip = () => { tip.hidden = true; };

/* Draw a map into `place`. `map` has
     of       the run whose layers and heads these are
     values   layers x heads, flat       bounds, middle  of the colours
     label    what is drawn, for the table's name         unit
     say(row, head)   text about a head  ring(row, head)  whether it is outlined
     mark(row, head)  a sign in the cell open(row, head)  what a click or Enter does; nothing without it */
function drawGrid(place, map) {
  const { of, values } = map, scale = scaleOf(map.middle), rows = of.layers.length;
  const room = place.clientWidth - 44, wide = Math.min(84, room / of.width);
  const tall = Math.max(9, Math.min(34, 560 / rows, Math.max(wide, 18)));
  const inside = wide >= 34 && tall >= 17 && of.width * rows <= 600;
  const step = (count, most) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64].find((size) => count / size <= most) || 100;
  const columnStep = step(of.width, Math.max(4, Math.floor(room / 22))), rowStep = step(rows, Math.max(8, Math.floor(rows * tall / 14)));
  const table = make("table.map" + (of.width > 40 || rows > 48 ? ".dense" : ""), { role: "grid", "aria-label": map.label });
  table.style.width = wide * of.width + 44 + "px";
  table.style.setProperty("--tall", tall + "px");
  const header = make("tr", {}, make("td.corner", {}, "layer"));
  for (let head = 0; head < of.width; head += 1) {
    header.append(make("th", { scope: "col", "aria-label": "head " + head }, head % columnStep ? "" : String(head)));
  }
  table.append(make("thead", {}, header));
  const body = make("tbody");
  of.layers.forEach((layer, row) => {
    const name = { scope: "row", title: layer.module, "aria-label": layerName(of, row) };
    const line = make("tr", {}, make("th", name, row % rowStep ? "" : String(layer.number)));
    for (let head = 0; head < of.width; head += 1) { line.append(drawCell(map, scale, inside, row, head)); }
    body.append(line);
  });
  table.append(body);
  const first = body.querySelector("[data-head]");
  if (first) { first.tabIndex = 0; }
  listen(table, map);
  place.replaceChildren(make("div.axis", {}, "head"), table, drawScale(map, scale));
}

// A number in a cell: as many digits as its map needs, and no zero before the point.
function inCell(value, [low, high]) {
  const largest = Math.max(Math.abs(low), Math.abs(high)), digits = largest < 0.1 ? 3 : largest < 3 ? 2 : largest < 100 ? 1 : 0;
  if (Number.isInteger(value) && largest < 1e5) { return String(value); }
  return largest >= 1e5 ? value.toExponential(0) : value.toFixed(digits).replace(/^-(0[.]?0*)$/, "$1").replace(/^(-?)0\./, "$1.");
}

function drawCell(map, scale, inside, row, head) {
  const value = map.values[placeOf(map.of, row, head)];
  if (head >= map.of.layers[row].heads) { return make("td.none", { "aria-hidden": "true" }); }
  const made = make("td", { role: "gridcell", tabindex: "-1", "data-row": row, "data-head": head,
    "aria-label": headName(map.of, row, head) + ": " + (known(value) ? shown(value) + " " + map.unit : "no number") });
  if (!known(value)) { made.className = "none"; return made; }
  const colour = colourOf(value, map.bounds, scale);
  made.style.backgroundColor = rgb(colour);
  made.style.color = inkOn(colour);
  if (map.ring && map.ring(row, head)) {
    made.className = "ring";
    made.ariaLabel += ", " + map.ringName;
  }
  const mark = map.mark && map.mark(row, head);
  if (inside) { made.textContent = inCell(value, map.bounds) + (mark ? "*" : ""); }
  else if (mark) { made.textContent = "•"; }
  return made;
}

function listen(table, map) {
  const target = (event) => event.target.closest("[data-head]");
  const where = (one) => [Number(one.dataset.row), Number(one.dataset.head)];
  const tell = (one) => { if (one) { showTip(map.say(...where(one)), one); } else { hideTip(); } };
  table.addEventListener("mouseover", (event) => tell(target(event)));
  table.addEventListener("mouseleave", hideTip);
  table.addEventListener("focusin", (event) => tell(target(event)));
  table.addEventListener("focusout", hideTip);
  const open = (one) => { if (one && map.open) { hideTip(); map.open(...where(one)); } };
  table.addEventListener("click", (event) => open(target(event)));
  if (map.open) { table.classList.add("opens"); }
  table.addEventListener("keydown", (event) => {
    const one = target(event);
    if (!one) { return; }
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(one); return; }
    if (event.key === "Escape") { hideTip(); return; }
    const [row, head] = where(one), last = map.of.layers[row].heads - 1;
    const moves = { ArrowLeft: [row, head - 1], ArrowRight: [row, head + 1], ArrowUp: [row - 1, head], ArrowDown: [row + 1, head],
      Home: [row, 0], End: [row, last], PageUp: [0, head], PageDown: [map.of.layers.length - 1, head] };
    const move = moves[event.key];
    if (!move) { return; }
    event.preventDefault();
    const next = table.querySelector(`[data-row="${move[0]}"][data-head="${move[1]}"]`);
    if (next) { one.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
}

// The colours of a map with numbers beside them.
function drawScale(map, scale) {
  const [low, high] = map.bounds, stops = [];
  for (let step = 0; step <= 16; step += 1) { stops.push(rgb(mixed(scale, step / 16))); }
  const bar = make("div.bar", { "aria-hidden": "true" });
  bar.style.background = "linear-gradient(to right, " + stops.join(", ") + ")";
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => make("span", {}, onAxis(low + share * (high - low), high - low)));
  return make("div.scale", {}, bar, make("div.ticks", {}, ticks), make("div.unit", {}, map.unitLine || map.unit));
}

// A small picture of a map, without numbers, on a canvas.
function drawSmall(canvas, of, values, bounds) {
  const cell = of.width * of.layers.length > 1500 ? 4 : 16, gap = cell > 4 ? 1 : 0, scale = scaleOf(false);
  canvas.width = of.width * cell;
  canvas.height = of.layers.length * cell;
  const pen = canvas.getContext("2d");
  eachHead(of, (row, head) => {
    const value = values[placeOf(of, row, head)];
    if (!known(value)) { return; }
    pen.fillStyle = rgb(colourOf(value, bounds, scale));
    pen.fillRect(head * cell, row * cell, cell - gap, cell - gap);
  });
}
