// Sections on two runs, and on what analyses left in a run.
function signOf(p) { return known(p) && p <= page.level ? "•" : ""; }

function drawComparison(number) {
  const found = page.comparisons[number], box = find("comparison-" + number), chooser = box.querySelector(".choose-stat");
  const stat = Number(chooser.value), what = box.querySelector(".choose-measure").value;
  const index = found.measures.indexOf(what), values = part(found.numbers, stat, index), middle = what === "effect" || what === "difference";
  const p = part(found.numbers, stat, found.measures.indexOf("p")), about = found.stats[stat], unit = what === "effect" ? "standard deviations" : what === "p" ? "" : about.unit;
  const both = part(found.numbers, stat).slice(0, 2 * values.length);
  drawGrid(box.querySelector(".chart"), {
    of: found, values: values, middle: middle, label: about.title + ", " + found.names[index] + ", layers by heads", unit: unit,
    unitLine: about.title + ", " + found.names[index] + (unit ? " (" + unit + ")" : ""),
    bounds: what === "p" ? [0, 1] : what === "a" || what === "b" ? boundsOf([both], about.fromZero, false) : boundsOf([values], false, middle),
    mark: (row, head) => signOf(p[placeOf(found, row, head)]),
    say: (row, head) => headName(found, row, head) + "  " + about.title + "\n" + found.measures.map((measure, at) =>
      found.names[at] + " " + shown(part(found.numbers, stat, at)[placeOf(found, row, head)])).join("\n"),
    open: found.opens ? (row, head) => openHead(0, row, head) : null,
  });
}

function differencesOf(row, head) {
  const found = page.comparisons.filter((one) => one.opens).map((one) => {
    const at = placeOf(one, row, head), number = (stat, measure) => part(one.numbers, stat, one.measures.indexOf(measure))[at];
    const rows = one.stats.map((about, stat) => ({ about: about, values: one.measures.map((measure) => number(stat, measure)) }))
      .filter((line) => known(line.values[0])).sort((a, b) => Math.abs(b.values[3]) - Math.abs(a.values[3])).slice(0, 8);
    return [make("p.quiet", {}, one.a + " (A) and " + one.b + " (B), the largest effects first"), make("table.numbers.plain", {},
      make("thead", {}, make("tr", {}, ["Statistic", "Mean A", "Mean B", "Effect g", "Corrected p"].map((text, place) => make("th" + (place ? ".number" : ""), { scope: "col" }, text)))),
      make("tbody", {}, rows.map((line) => make("tr", {}, make("th", { scope: "row" }, line.about.title, make("span.unit", {}, " " + line.about.unit)),
        [0, 1, 3, 4].map((place) => make("td.number", {}, place === 3 ? signed(line.values[3]) : shown(line.values[place])))))))];
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
  const column = Number(box.querySelector(".choose-column").value), group = Number(box.querySelector(".choose-group").value), about = result.columns[column];
  box.querySelector(".meaning").textContent = result.plane.includes(column) ? "" : worded(about) + ": " + about.meaning;
  const values = part(result.numbers, column, group), all = result.groups.map((_, place) => part(result.numbers, column, place));
  if (!result.plane.includes(column)) { drawGrid(box.querySelector(".chart"), {
    of: of, values: values, middle: about.zero, bounds: boundsOf(all, false, about.zero), label: result.title + ": " + about.name + ", layers by heads",
    unit: about.unit, unitLine: withUnit(about),
    say: (row, head) => headName(of, row, head) + "\n" + result.columns.map((one, place) =>
      worded(one) + " " + shown(part(result.numbers, place, group)[placeOf(of, row, head)]) + " " + one.unit).join("\n"),
    open: (row, head) => openHead(page.runs.indexOf(of), row, head),
  }); }
  const plane = box.querySelector(".plane");
  if (plane) { plane.replaceChildren(drawPlane(of, result, group, column, drawingWidth(plane))); }
}

// As wide as there is room, so that letters keep their size on a phone.
const drawingWidth = (place) => Math.round(Math.max(280, Math.min(place.clientWidth, 780)));

// Heads as points; near ones are alike. Coloured by the column that is chosen, or by layer where that is a place itself.
function drawPlane(of, result, group, column, wide) {
  const [across, up] = result.plane.map((place) => part(result.numbers, place, group));
  const byLayer = result.plane.includes(column), colours = byLayer ? across.map((_, place) => Math.floor(place / of.width)) : part(result.numbers, column, group);
  const bounds = boundsOf([Array.from(colours).filter((_, place) => known(across[place]))], false, !byLayer && result.columns[column].zero);
  const [left, right] = boundsOf([across], false, false), [low, high] = boundsOf([up], false, false), tall = Math.round(0.66 * wide);
  const scale = scaleOf(!byLayer && result.columns[column].zero), made = make("svg.scatter", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": "Heads in the plane; near ones are alike" });
  eachHead(of, (row, head) => {
    const place = placeOf(of, row, head);
    if (!known(across[place])) { return; }
    const x = 20 + (wide - 60) * (across[place] - left) / (right - left), y = tall - 20 - (tall - 40) * (up[place] - low) / (high - low);
    const few = of.width * of.layers.length <= 300, colour = known(colours[place]) ? rgb(colourOf(colours[place], bounds, scale)) : "none";
    made.append(make("g.point", {}, make("title", {}, headName(of, row, head) + result.columns.map((one, at) => (result.plane.includes(at) ? "" : "\n" + worded(one) + " " + shown(part(result.numbers, at, group)[place]))).join("")), make("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: few ? 6 : 4, fill: colour }),
      !few ? null : make("text", { x: (x + 8).toFixed(1), y: (y + 3.5).toFixed(1) }, of.layers[row].number + "." + head)));
  });
  return make("figure", {}, made, make("figcaption", {}, "Each point is a head (layer.head); near ones are alike. Colour: " + (byLayer ? "layer, deeper ones stronger" : worded(result.columns[column])) + "."));
}

function drawCurve(of, result, box) {
  const x = part(result.numbers, 0), lines = result.columns.slice(1), [left, right] = boundsOf([x], false, false);
  const all = lines.map((_, place) => part(result.numbers, place + 1)), [low, high] = boundsOf(all, false, false);
  const wide = drawingWidth(box.querySelector(".chart")), tall = Math.round(0.55 * wide), foot = tall - 44;
  const across = (value) => 50 + (wide - 66) * (value - left) / (right - left), up = (value) => foot - (foot - 10) * (value - low) / (high - low);
  const made = make("svg.curve", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": result.title });
  [0, 0.25, 0.5, 0.75, 1].forEach((share) => {
    const y = up(low + share * (high - low)), at = across(left + share * (right - left));
    made.append(make("line.rule", { x1: 50, x2: wide - 16, y1: y, y2: y }), make("text.tick", { x: 44, y: y + 4, "text-anchor": "end" }, shown(Math.abs(low + share * (high - low)) < 1e-6 * (high - low) ? 0 : low + share * (high - low), 3)),
      make("text.tick", { x: at, y: foot + 18, "text-anchor": "middle" }, shown(left + share * (right - left), 3)));
  });
  made.append(make("text.tick", { x: wide / 2, y: tall - 4, "text-anchor": "middle" }, withUnit(result.columns[0])));
  all.forEach((values, place) => made.append(make("polyline.line.line-" + (place % 5), { points: Array.from(values).map((value, at) => [across(x[at]), up(value)])
    .filter(([, y]) => known(y)).map((point) => point.map((one) => one.toFixed(1)).join(",")).join(" ") })));
  const keys = lines.map((one, place) => make("li", {}, make("span.key.line-" + (place % 5), { "aria-hidden": "true" }), withUnit(one), make("span.quiet", {}, " " + one.meaning)));
  const table = make("details", {}, make("summary", {}, "The same as numbers"), make("div.scroll", { tabindex: 0, role: "region", "aria-label": "Numbers of the curve" }, make("table.numbers.plain", {},
    make("thead", {}, make("tr", {}, result.columns.map((one) => make("th.number", { scope: "col" }, worded(one))))),
    make("tbody", {}, Array.from(x).map((_, at) => make("tr", {}, result.columns.map((_column, place) => make("td.number", {}, shown(part(result.numbers, place)[at])))))))));
  box.querySelector(".chart").replaceChildren(made, make("ul.keys", {}, keys), table);
}

function drawPairs(of, result, box) {
  const column = Number(box.querySelector(".choose-column").value), about = result.columns[column], values = part(result.numbers, column);
  box.querySelector(".meaning").textContent = worded(about) + ": " + about.meaning;
  const order = Array.from(values.keys()).filter((at) => known(values[at])).sort((one, other) => values[other] - values[one]);
  const list = (title, places) => make("div", {}, make("h3", {}, title), make("ol.alike", {}, places.map((at) => make("li", {},
    headLink(of, ...pairPlaces(of, result, at)[0]), " and ", headLink(of, ...pairPlaces(of, result, at)[1]), make("span.quiet", {}, " " + shown(values[at]) + " " + about.unit)))));
  const chart = box.querySelector(".chart"), parts = [make("div.lists", {}, list("Largest", order.slice(0, 8)), list("Smallest", order.slice(-8).reverse()))];
  const heads = of.width * of.layers.length;
  if (heads <= 1200 && !result.dropped) { parts.unshift(drawMatrix(of, result, values, about, heads)); }
  if (result.dropped) { parts.push(make("p.legend", {}, "The page has the largest and the smallest pairs of each head; " + shown(result.dropped) + " more are in the run.")); }
  chart.replaceChildren(...parts);
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
  const lists = of.results.filter((result) => result.kind === "pairs" && result.name !== "head_distances").flatMap((result) => result.columns.map((about, column) => {
    const found = pairsOf(of, result, column, row, head).slice(0, 3);
    return found.length ? make("div", {}, make("h3", { title: about.meaning }, result.title + ", " + worded(about)), pairList(of, found)) : null;
  })).filter(Boolean);
  return section("With other heads", "The largest numbers of pairs with this head.", lists.length ? make("div.lists", {}, lists) : null);
}

const pairPlaces = (of, result, at) => [0, 2].map((first) => [part(result.places, first)[at], part(result.places, first + 1)[at]]);

function drawMatrix(of, result, values, about, heads) {
  const canvas = make("canvas.matrix", { role: "img", "aria-label": about.name + " of every two heads" }), size = Math.max(1, Math.floor(720 / heads)), scale = scaleOf(about.zero);
  const bounds = boundsOf([values], false, about.zero), pen = canvas.getContext("2d");
  canvas.width = canvas.height = heads * size;
  values.forEach((value, at) => {
    if (!known(value)) { return; }
    const [one, other] = pairPlaces(of, result, at).map((place) => placeOf(of, ...place));
    pen.fillStyle = rgb(colourOf(value, bounds, scale));
    pen.fillRect(other * size, one * size, size, size);
  });
  // Lines between layers.
  pen.fillStyle = getComputedStyle(document.body).backgroundColor;
  for (let at = of.width; at < heads; at += of.width) { pen.fillRect(at * size - 1, 0, 1, canvas.height); pen.fillRect(0, at * size - 1, canvas.width, 1); }
  const pairs = new Map(Array.from(values, (_, at) => [pairPlaces(of, result, at).map((place) => placeOf(of, ...place)).join(), at]));
  canvas.addEventListener("mousemove", (event) => {
    const [one, other] = [event.offsetY, event.offsetX].map((offset) => Math.floor(offset * heads / canvas.clientWidth)), at = pairs.get(one + "," + other);
    if (at === undefined) { hideTip(); return; }
    const names = pairPlaces(of, result, at).map((place) => headName(of, ...place));
    showTip(names.join(", ") + "\n" + shown(values[at]) + " " + about.unit, { getBoundingClientRect: () => ({ left: event.clientX, top: event.clientY, bottom: event.clientY, width: 0 }) });
  });
  canvas.addEventListener("mouseleave", hideTip);
  const note = "Rows: the first head of a pair, columns: the other; heads in order, lines between layers.";
  return make("figure.matrix", {}, canvas, drawScale({ bounds: bounds, unit: about.unit, unitLine: withUnit(about) }, scale), make("figcaption", {}, note));
}

function resultsOf(of, row, head) {
  const place = placeOf(of, row, head), lines = [];
  of.results.filter((result) => result.kind === "heads").forEach((result) => result.columns.forEach((about, column) => {
    const values = part(result.numbers, column, 0), own = values[place], others = Array.from(values).filter(known);
    if (!known(own) || result.plane.includes(column)) { return; }
    lines.push(make("tr", {}, make("th", { scope: "row" }, worded(about), about.unit === about.name ? null : make("span.unit", {}, " " + about.unit)),
      make("td.number", {}, shown(own)), make("td.number", {}, ordinal(others.filter((value) => value > own).length + 1) + " of " + others.length), make("td.quiet", {}, result.title + ": " + about.meaning)));
  }));
  return section("In the analyses", null, lines.length ? make("table.numbers.plain", {}, make("thead", {}, make("tr", {},
    make("th", { scope: "col" }, "Number"), make("th.number", { scope: "col" }, "Value"), make("th.number", { scope: "col" }, "Rank"), make("th", { scope: "col" }, "What it is"))), make("tbody", {}, lines)) : null);
}
