// Sections on two runs, and on what analyses left in a run.
function signOf(p) { return known(p) && p <= page.level ? "•" : ""; }

function drawComparison(number) {
  const found = page.comparisons[number], box = find("comparison-" + number), what = box.querySelector(".choose-measure").value;
  const stat = Number(box.querySelector(".choose-stat").value), about = found.stats[stat], index = found.measures.indexOf(what);
  const grid = (measure) => part(found.numbers, stat, found.measures.indexOf(measure)), values = grid(what), p = grid("p");
  const middle = what === "effect" || what === "difference", unit = { effect: "standard deviations", p: "" }[what] ?? about.unit;
  // The means of both on one scale, so that their pictures can be compared.
  const bounds = { p: [0, 1], a: boundsOf([grid("a"), grid("b")], about.fromZero, false) };
  drawGrid(box.querySelector(".chart"), {
    of: found, values: values, middle: middle, bounds: bounds[what === "b" ? "a" : what] || boundsOf([values], false, middle),
    label: about.title + ", " + found.names[index] + ", layers by heads", unit: unit,
    unitLine: about.title + ", " + found.names[index] + (unit ? " (" + unit + ")" : ""),
    mark: (row, head) => signOf(p[placeOf(found, row, head)]),
    say: (row, head) => [headName(found, row, head) + "  " + about.title, ...found.measures.map((measure, at) =>
      found.names[at] + " " + shown(grid(measure)[placeOf(found, row, head)]))].join("\n"),
    open: found.opens ? (row, head) => openHead(0, row, head) : null,
  });
}

function differencesOf(row, head) {
  const columns = [["Statistic"], ...["Mean A", "Mean B", "Effect g", "Corrected p"].map((name) => [name, "number"])];
  const found = page.comparisons.filter((one) => one.opens).map((one) => {
    const place = placeOf(one, row, head);
    const number = (stat, measure) => part(one.numbers, stat, one.measures.indexOf(measure))[place];
    const rows = one.stats.map((about, stat) => [about, number(stat, "effect"), number(stat, "a"), number(stat, "b"), number(stat, "p")])
      .filter(([, effect]) => known(effect)).sort((first, second) => Math.abs(second[1]) - Math.abs(first[1])).slice(0, 8)
      .map(([about, effect, a, b, p]) => [titled(about), shown(a), shown(b), signed(effect), shown(p)]);
    return [make("p.quiet", {}, one.a + " (A) and " + one.b + " (B), the largest effects first"), tableOf("plain", columns, rows)];
  });
  return section("Between the runs", null, found.length ? found : null);
}

const worded = (column) => column.name.replace(/_/g, " ");
const withUnit = (column) => worded(column) + (column.unit && column.unit !== column.name ? " (" + column.unit + ")" : "");

function drawResult(of, result, box) {
  const draw = { heads: drawHeadsResult, pairs: drawPairs, curve: drawCurve }[result.kind];
  draw(of, result, box);
}

function drawHeadsResult(of, result, box) {
  const [column, group] = [".choose-column", ".choose-group"].map((name) => Number(box.querySelector(name).value));
  const about = result.columns[column], numbers = (at) => part(result.numbers, at, group), plane = box.querySelector(".plane");
  if (plane) { plane.replaceChildren(drawPlane(of, result, group, column, drawingWidth(plane))); }
  if (result.plane.includes(column)) { return; }
  box.querySelector(".meaning").textContent = worded(about) + ": " + about.meaning;
  drawGrid(box.querySelector(".chart"), {
    of: of, values: numbers(column), middle: about.zero,
    bounds: boundsOf(result.groups.map((_, place) => part(result.numbers, column, place)), false, about.zero),
    label: result.title + ": " + about.name + ", layers by heads", unit: about.unit, unitLine: withUnit(about),
    say: (row, head) => [headName(of, row, head), ...result.columns.map((one, place) =>
      worded(one) + " " + shown(numbers(place)[placeOf(of, row, head)]) + " " + one.unit)].join("\n"),
    open: (row, head) => openHead(page.runs.indexOf(of), row, head),
  });
}

// As wide as there is room, so that letters keep their size on a phone.
const drawingWidth = (place) => Math.round(Math.max(280, Math.min(place.clientWidth, 780)));

// Heads as points; near ones are alike. Coloured by the column that is chosen, or by layer where that is a place itself.
function drawPlane(of, result, group, column, wide) {
  const [across, up] = result.plane.map((place) => part(result.numbers, place, group)), byLayer = result.plane.includes(column);
  const [left, right] = boundsOf([across], false, false), [low, high] = boundsOf([up], false, false), tall = Math.round(0.66 * wide);
  const middle = !byLayer && result.columns[column].zero, scale = scaleOf(middle), few = of.width * of.layers.length <= 300;
  const values = byLayer ? across.map((_, place) => Math.floor(place / of.width)) : part(result.numbers, column, group);
  const bounds = boundsOf([values.filter((_, place) => known(across[place]))], false, middle);
  const others = result.columns.map((one, at) => [one, at]).filter(([, at]) => !result.plane.includes(at));
  const label = "Heads in the plane; near ones are alike";
  const made = make("svg.scatter", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": label });
  eachHead(of, (row, head) => {
    const place = placeOf(of, row, head);
    if (!known(across[place])) { return; }
    const x = 20 + (wide - 60) * (across[place] - left) / (right - left), y = tall - 20 - (tall - 40) * (up[place] - low) / (high - low);
    const colour = known(values[place]) ? rgb(colourOf(values[place], bounds, scale)) : "none";
    const said = [headName(of, row, head), ...others.map(([one, at]) => worded(one) + " " + shown(part(result.numbers, at, group)[place]))];
    made.append(make("g.point", {}, make("title", {}, said.join("\n")),
      make("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: few ? 6 : 4, fill: colour }),
      few ? make("text", { x: (x + 8).toFixed(1), y: (y + 3.5).toFixed(1) }, of.layers[row].number + "." + head) : null));
  });
  const colours = byLayer ? "layer, deeper ones stronger" : worded(result.columns[column]);
  const caption = "Each point is a head (layer.head); near ones are alike. Colour: " + colours + ".";
  return make("figure", {}, made, make("figcaption", {}, caption));
}

function drawCurve(of, result, box) {
  const chart = box.querySelector(".chart"), [first, ...lines] = result.columns, x = part(result.numbers, 0);
  const all = lines.map((_, place) => part(result.numbers, place + 1));
  const [left, right] = boundsOf([x], false, false), [low, high] = boundsOf(all, false, false);
  const wide = drawingWidth(chart), tall = Math.round(0.55 * wide), foot = tall - 44;
  const across = (value) => 50 + (wide - 66) * (value - left) / (right - left);
  const up = (value) => foot - (foot - 10) * (value - low) / (high - low);
  const made = make("svg.curve", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": result.title });
  const letters = (text, x_, y_, anchor) => make("text.tick", { x: x_, y: y_, "text-anchor": anchor }, text);
  [0, 0.25, 0.5, 0.75, 1].forEach((share) => {
    const value = low + share * (high - low), at = left + share * (right - left), y = up(value);
    const nothing = Math.abs(value) < 1e-6 * (high - low);
    made.append(make("line.rule", { x1: 50, x2: wide - 16, y1: y, y2: y }), letters(shown(nothing ? 0 : value), 44, y + 4, "end"),
      letters(shown(at), across(at), foot + 18, "middle"));
  });
  made.append(letters(withUnit(first), wide / 2, tall - 4, "middle"));
  all.forEach((values, place) => {
    const points = Array.from(values).map((value, at) => [across(x[at]), up(value)]).filter(([, y]) => known(y))
      .map((point) => point.map((one) => one.toFixed(1)).join(","));
    made.append(make("polyline.line.line-" + (place % 5), { points: points.join(" ") }));
  });
  const keys = lines.map((one, place) => make("li", {}, make("span.key.line-" + (place % 5), { "aria-hidden": "true" }),
    withUnit(one), make("span.quiet", {}, " " + one.meaning)));
  const rows = Array.from(x).map((_, at) => result.columns.map((_column, place) => shown(part(result.numbers, place)[at])));
  const table = tableOf("plain", result.columns.map((one) => [worded(one), "number"]), rows);
  chart.replaceChildren(made, make("ul.keys", {}, keys),
    make("details", {}, make("summary", {}, "The same as numbers"), scrolled("Numbers of the curve", table)));
}

function drawPairs(of, result, box) {
  const column = Number(box.querySelector(".choose-column").value), about = result.columns[column], values = part(result.numbers, column);
  box.querySelector(".meaning").textContent = worded(about) + ": " + about.meaning;
  const order = Array.from(values.keys()).filter((at) => known(values[at])).sort((one, other) => values[other] - values[one]);
  const item = (at) => {
    const [one, other] = pairPlaces(of, result, at).map((place) => headLink(of, ...place));
    return make("li", {}, one, " and ", other, make("span.quiet", {}, " " + shown(values[at]) + " " + about.unit));
  };
  const list = (title, places) => make("div", {}, make("h3", {}, title), make("ol.alike", {}, places.map(item)));
  const parts = [make("div.lists", {}, list("Largest", order.slice(0, 8)), list("Smallest", order.slice(-8).reverse()))];
  if (result.dropped) {
    const rest = "The page has the largest and the smallest pairs of each head; " + shown(result.dropped) + " more are in the run.";
    parts.push(make("p.legend", {}, rest));
  } else if (of.width * of.layers.length <= 1200) { parts.unshift(drawMatrix(of, result, values, about)); }
  box.querySelector(".chart").replaceChildren(...parts);
}

// [row, head, number] of the heads that make a pair with this one, the largest number first.
function pairsOf(of, result, column, row, head) {
  const values = part(result.numbers, column), own = placeOf(of, row, head), found = [];
  values.forEach((value, at) => {
    const [one, other] = pairPlaces(of, result, at);
    if (!known(value)) { return; }
    if (placeOf(of, ...one) === own) { found.push([...other, value]); }
    else if (placeOf(of, ...other) === own) { found.push([...one, value]); }
  });
  return found.sort((one, other) => other[2] - one[2]);
}

function pairsSection(of, row, head) {
  const results = of.results.filter((result) => result.kind === "pairs" && result.name !== "head_distances");
  const lists = results.flatMap((result) => result.columns.map((about, column) => {
    const found = pairsOf(of, result, column, row, head).slice(0, 3);
    const heading = make("h3", { title: about.meaning }, result.title + ", " + worded(about));
    return found.length ? make("div", {}, heading, pairList(of, found)) : null;
  })).filter(Boolean);
  return section("With other heads", "The largest numbers of pairs with this head.", lists.length ? make("div.lists", {}, lists) : null);
}

const pairPlaces = (of, result, at) =>
  [0, 2].map((first) => [part(result.places, first)[at], part(result.places, first + 1)[at]]);

function drawMatrix(of, result, values, about) {
  const heads = of.width * of.layers.length, size = Math.max(1, Math.floor(720 / heads)), scale = scaleOf(about.zero);
  const canvas = make("canvas.matrix", { role: "img", "aria-label": about.name + " of every two heads" }), pen = canvas.getContext("2d");
  const bounds = boundsOf([values], false, about.zero), pairs = new Map();
  canvas.width = canvas.height = heads * size;
  values.forEach((value, at) => {
    const [one, other] = pairPlaces(of, result, at).map((place) => placeOf(of, ...place));
    if (!known(value)) { return; }
    pairs.set(one + "," + other, at);
    pen.fillStyle = rgb(colourOf(value, bounds, scale));
    pen.fillRect(other * size, one * size, size, size);
  });
  pen.fillStyle = isDark() ? "#11151b" : "#ffffff";
  for (let at = of.width * size - 1; at < heads * size - 1; at += of.width * size) {
    pen.fillRect(at, 0, 1, canvas.height);
    pen.fillRect(0, at, canvas.width, 1);
  }
  canvas.addEventListener("mousemove", (event) => {
    const [one, other] = [event.offsetY, event.offsetX].map((offset) => Math.floor(offset * heads / canvas.clientWidth));
    const at = pairs.get(one + "," + other);
    if (at === undefined) { hideTip(); return; }
    const names = pairPlaces(of, result, at).map((place) => headName(of, ...place));
    const box = { left: event.clientX, top: event.clientY, bottom: event.clientY, width: 0 };
    showTip(names.join(", ") + "\n" + shown(values[at]) + " " + about.unit, { getBoundingClientRect: () => box });
  });
  canvas.addEventListener("mouseleave", hideTip);
  const legend = drawScale({ bounds: bounds, unit: about.unit, unitLine: withUnit(about) }, scale);
  return make("figure.matrix", {}, canvas, legend,
    make("figcaption", {}, "Rows: the first head of a pair, columns: the other; heads in order, lines between layers."));
}

function resultsOf(of, row, head) {
  const place = placeOf(of, row, head), columns = [["Number"], ["Value", "number"], ["Rank", "number"], ["What it is", "quiet"]];
  const rows = of.results.filter((result) => result.kind === "heads").flatMap((result) => result.columns.map((about, column) => {
    const values = part(result.numbers, column, 0), unit = about.unit === about.name ? null : make("span.unit", {}, " " + about.unit);
    if (!known(values[place]) || result.plane.includes(column)) { return null; }
    const what = [result.title, make("span.wide", {}, ": " + about.meaning)];
    return [[worded(about), unit], shown(values[place]), rankIn(values, place), what];
  })).filter(Boolean);
  return section("In the analyses", null, rows.length ? tableOf("plain", columns, rows) : null);
}
