// Every head: a small map of each statistic, and a large one of the chosen.
const chosenBounds = (of, stat, measure) => {
  const about = of.stats[stat], key = stat + measure;
  of.bounds = of.bounds || {};
  // One scale for all groups, and for the same statistic of all runs, so that their pictures can be compared.
  of.bounds[key] = of.bounds[key] || boundsOf(page.runs.flatMap((one) => {
    const same = one.stats.findIndex((other) => other.stat === about.stat);
    return same < 0 ? [] : one.groups.map((_, group) => gridOf(one, same, group, measure));
  }), about.fromZero || measure === "std" || measure === "count", false);
  return of.bounds[key];
};

function sayHead(of, stat, group, row, head) {
  const place = placeOf(of, row, head), about = of.stats[stat];
  const number = (measure) => gridOf(of, stat, group, measure)[place];
  const lines = [headName(of, row, head) + "  " + about.title, of.layers[row].module,
    "mean " + shown(number("mean"), 4) + "  std " + shown(number("std")) + "  (" + about.unit + ")"];
  if (known(number("p50"))) {
    lines.push("5 % " + shown(number("p05")) + "  median " + shown(number("p50")) + "  95 % " + shown(number("p95")));
  }
  lines.push("from " + shown(number("min")) + " to " + shown(number("max")) + ", " + shown(number("count")) + " rows");
  return lines.join("\n");
}

function drawTiles() {
  const of = run();
  find("tiles").replaceChildren(...of.stats.map((about, stat) => {
    const measure = about.measure, bounds = chosenBounds(of, stat, measure), canvas = make("canvas", { "aria-hidden": "true" });
    drawSmall(canvas, of, gridOf(of, stat, state.group, measure), bounds);
    const range = bounds.map((bound) => onAxis(bound, bounds[1] - bounds[0])).join(" – ");
    canvas.style.height = Math.min(120, Math.max(56, of.layers.length * 12)) + "px";
    return make("button.tile", { type: "button", "data-stat": about.stat, "aria-pressed": String(stat === state.stat),
      onclick: () => { chooseStat(stat); find("panel").scrollIntoView({ behavior: "smooth", block: "nearest" }); } },
    make("span.tile-title", {}, about.title), canvas,
    make("span.tile-range", {}, range + " " + about.unit + (measure === "mean" ? "" : " (" + measure + ")")));
  }));
}

function mainMap() {
  const of = run(), about = of.stats[state.stat], less = state.less >= 0;
  let values = gridOf(of, state.stat, state.group, state.measure);
  if (less) {
    const other = gridOf(of, state.stat, state.less, state.measure);
    values = values.map((value, place) => value - other[place]);
  }
  const means = gridOf(of, state.stat, state.group, "mean"), passes = about.threshold !== null && state.measure === "mean" && !less;
  const unit = state.measure === "count" ? "rows" : about.unit, than = less && groupName(of, state.less);
  const group = of.groups.length < 2 ? "" : ", " + groupName(of, state.group) + (less ? " less " + than : "");
  const what = about.title + ", " + MEASURE_NAMES[state.measure] + group;
  return {
    of: of, values: values, middle: less, bounds: less ? boundsOf([values], false, true) : chosenBounds(of, state.stat, state.measure),
    label: what + ", layers by heads", unit: unit, unitLine: what + (state.measure === "count" ? "" : " (" + unit + ")"),
    say: (row, head) => sayHead(of, state.stat, state.group, row, head)
      + (less ? "\n" + than + " mean " + shown(gridOf(of, state.stat, state.less, "mean")[placeOf(of, row, head)], 4) : ""),
    ring: (row, head) => passes && means[placeOf(of, row, head)] > about.threshold, ringName: "beyond the threshold",
    open: (row, head) => openHead(state.run, row, head),
  };
}

function drawPanel() {
  const of = run(), about = of.stats[state.stat], map = mainMap();
  find("map-title").textContent = about.title;
  find("map-unit").textContent = about.unit;
  find("map-explanation").textContent = about.explanation;
  find("choose-run").value = String(state.run);
  find("choose-stat").value = String(state.stat);
  find("choose-group").value = String(state.group);
  find("choose-less").value = String(state.less);
  const empty = (measure) => !gridOf(of, state.stat, state.group, measure).some(known);
  fill(find("choose-measure"), page.measures.map((measure) => [measure, MEASURE_NAMES[measure], empty(measure)]), state.measure);
  drawGrid(find("chart"), map);
  const notes = [];
  if (about.threshold !== null && state.measure === "mean" && state.less < 0) {
    notes.push("Outlined: heads with a mean above " + about.threshold + ".");
  }
  if (of.groups[state.group] === "") { notes.push("Percentiles are there for single groups."); }
  if (of.dropped) { notes.push("The page has the groups with most rows; " + of.dropped + " more are in heads.parquet."); }
  notes.push("Choose a head for its own page.");
  find("map-legend").textContent = notes.join(" ");
}

function choose(change) {
  Object.assign(state, change);
  const of = run();
  if (!gridOf(of, state.stat, state.group, state.measure).some(known)) { state.measure = of.stats[state.stat].measure; }
  if (state.less === state.group) { state.less = -1; }
  drawTiles();
  drawPanel();
}

function chooseStat(stat) { choose({ stat: stat, measure: run().stats[stat].measure }); }

// Another run has other statistics and groups: what has the same name stays chosen.
function chooseRun(number) {
  const before = run(), of = page.runs[number];
  const stat = Math.max(0, of.stats.findIndex((one) => one.stat === before.stats[state.stat].stat));
  const group = Math.max(0, of.groups.indexOf(before.groups[state.group]));
  state.run = number;
  fillChoosers();
  choose({ stat: stat, group: group, less: -1 });
}

function fillChoosers() {
  const of = run(), groups = of.groups.map((_, group) => [group, groupName(of, group)]);
  fill(find("choose-run"), page.runs.map((one, place) => [place, one.label]), state.run);
  fill(find("choose-stat"), of.stats.map((about, stat) => [stat, about.title]), state.stat);
  fill(find("choose-group"), groups, state.group);
  fill(find("choose-less"), [[-1, "nothing"], ...groups], state.less);
  find("run-label").hidden = page.runs.length < 2;
  find("group-label").hidden = find("less-label").hidden = groups.length < 2;
}

function rowsOf(of) {
  const rows = [];
  of.groups.forEach((name, group) => {
    if (name === "") { return; }
    of.stats.forEach((about, stat) => eachHead(of, (row, head) => {
      const numbers = page.measures.map((measure) => gridOf(of, stat, group, measure)[placeOf(of, row, head)]);
      if (numbers.some(known)) { rows.push([of.layers[row].number, of.layers[row].module, head, about.stat, name, ...numbers]); }
    }));
  });
  return rows;
}
const ROW_HEADER = ["layer", "module", "head", "stat", "group", ...page.measures];
