(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.maps.length) { document.getElementById("panel").hidden = true; return; }
  const find = (id) => document.getElementById(id);
  const darkQuery = window.matchMedia("(prefers-color-scheme: dark)");
  const MEASURE_NAMES = { mean: "mean", std: "standard deviation", p05: "5th percentile", p50: "median",
    p95: "95th percentile", min: "smallest", max: "largest" };
  const state = { stat: data.maps[0].stat, group: data.maps[0].group, measure: data.maps[0].measure, picked: null, printing: false };

  const isDark = () => darkQuery.matches && !state.printing;
  const colours = () => (isDark() ? data.colours.dark : data.colours.light);
  const cssVariable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const mapOf = (stat, group) => data.maps.find((map) => map.stat === stat && map.group === group)
    || data.maps.find((map) => map.stat === stat);
  const known = (grid) => grid.flat().filter((value) => value !== null);
  const shorten = (value, figures = 4) => (value === null ? "–" : String(Number(value.toPrecision(figures))));
  // Plotly reads a little HTML in its texts; names of modules and features are the user's.
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function bounds(map, measure) {
    const values = known(map.grids[measure]);
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) { return [0, 1]; }
    if (map.fromZero || measure === "std") { low = Math.min(low, 0); }
    return high > low ? [low, high] : [low, low + 1];
  }

  function mixed(scale, share) {
    const place = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
    const index = Math.min(Math.floor(place), scale.length - 2), rest = place - index;
    const channel = (colour, at) => parseInt(colour.slice(at, at + 2), 16);
    return "rgb(" + [1, 3, 5].map((at) =>
      Math.round(channel(scale[index], at) * (1 - rest) + channel(scale[index + 1], at) * rest)).join(",") + ")";
  }

  function drawTile(tile) {
    const map = mapOf(tile.dataset.stat, state.group), canvas = tile.querySelector("canvas");
    const [low, high] = bounds(map, map.measure), scale = colours();
    // A gap between cells where there is room for one; drawn large enough to stay sharp on paper.
    const cell = data.heads * data.layers.length > 1500 ? 4 : 16, gap = cell > 4 ? 1 : 0;
    canvas.width = data.heads * cell;
    canvas.height = data.layers.length * cell;
    const pen = canvas.getContext("2d");
    map.grids[map.measure].forEach((row, layer) => row.forEach((value, head) => {
      if (value === null) { return; }
      pen.fillStyle = mixed(scale, (value - low) / (high - low));
      pen.fillRect(head * cell, layer * cell, cell - gap, cell - gap);
    }));
    tile.querySelector(".tile-bounds").textContent = shorten(low, 2) + " – " + shorten(high, 2) + (map.measure === "mean" ? "" : " (" + map.measure + ")");
    tile.setAttribute("aria-pressed", String(tile.dataset.stat === state.stat));
  }

  function hoverText(map, layer, head) {
    const number = (measure) => shorten(map.grids[measure][layer][head]);
    return "<b>layer " + data.layers[layer].number + " head " + head + "</b><br>" +
      escaped(data.layers[layer].module) + "<br>mean " + number("mean") + "  (std " + number("std") + ")<br>" +
      "5% " + number("p05") + "   median " + number("p50") + "   95% " + number("p95") + "<br>" +
      "from " + number("min") + " to " + number("max") + ", " +
      (map.grids.count[layer][head] === null ? "no" : map.grids.count[layer][head].toLocaleString("en")) + " rows";
  }

  function outline(layer, head, colour, width) {
    return { type: "rect", x0: head - 0.5, x1: head + 0.5, y0: layer - 0.5, y1: layer + 0.5,
      line: { color: colour, width: width }, fillcolor: "rgba(0,0,0,0)" };
  }

  function outlines(map) {
    const shapes = [];
    if (map.threshold !== null && state.measure === "mean") {
      map.grids.mean.forEach((row, layer) => row.forEach((value, head) => {
        if (value !== null && value > map.threshold) { shapes.push(outline(layer, head, cssVariable("--focus"), 2)); }
      }));
    }
    if (state.picked) { shapes.push(outline(state.picked.layer, state.picked.head, cssVariable("--focus"), 4)); }
    return shapes;
  }

  function drawChart(map) {
    const [low, high] = bounds(map, state.measure), narrow = window.innerWidth < 640;
    const grid = map.grids[state.measure], rows = data.layers.length, scale = colours();
    const trace = {
      type: "heatmap", z: grid, zmin: low, zmax: high, xgap: data.heads > 48 ? 0 : 2, ygap: rows > 48 ? 0 : 2,
      colorscale: scale.map((colour, place) => [place / (scale.length - 1), colour]),
      text: grid.map((row, layer) => row.map((value, head) => (value === null ? "" : hoverText(map, layer, head)))),
      hovertemplate: "%{text}<extra></extra>", hoverongaps: false,
      colorbar: narrow ? { orientation: "h", thickness: 10, y: -0.02, yanchor: "top", ypad: 42, outlinewidth: 0, nticks: 5 }
        : { thickness: 12, outlinewidth: 0, len: 1, ypad: 0, nticks: 6 },
    };
    const cell = Math.max(7, Math.min(40, 560 / rows));
    const layout = {
      height: Math.max(rows * cell, 150) + (narrow ? 125 : 70), margin: { l: narrow ? 34 : 52, r: 8, t: 8, b: narrow ? 95 : 48 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 13, color: cssVariable("--text") },
      xaxis: { title: { text: "head", standoff: 6 }, dtick: data.heads > 24 ? undefined : narrow && data.heads > 12 ? 2 : 1,
        showgrid: false, zeroline: false, fixedrange: true },
      yaxis: { title: narrow ? undefined : { text: "layer", standoff: 8 }, autorange: "reversed", showgrid: false, zeroline: false, fixedrange: true,
        tickvals: tickRows(), ticktext: tickRows().map((row) => String(data.layers[row].number)) },
      hoverlabel: { align: "left", bgcolor: cssVariable("--page"), bordercolor: cssVariable("--line"), font: { color: cssVariable("--text"), size: 13 } },
      shapes: outlines(map),
    };
    Plotly.react(find("chart"), [trace], layout, { responsive: true, displayModeBar: false });
  }

  function tickRows() {
    const step = Math.ceil(data.layers.length / 32);
    return data.layers.map((_, row) => row).filter((row) => row % step === 0);
  }

  function drawNumbers(map) {
    const table = find("number-table"), grid = map.grids[state.measure];
    const cell = (row, tag, text) => { const made = document.createElement(tag); made.textContent = text; row.append(made); return made; };
    table.replaceChildren();
    const caption = document.createElement("caption");
    caption.textContent = map.title + ", " + MEASURE_NAMES[state.measure] + " (" + map.unit + ")";
    table.append(caption);
    const head = table.createTHead().insertRow();
    cell(head, "th", "layer").scope = "col";
    for (let place = 0; place < data.heads; place += 1) { cell(head, "th", "head " + place).scope = "col"; }
    const body = table.createTBody();
    grid.forEach((values, layer) => {
      const row = body.insertRow();
      const name = cell(row, "th", String(data.layers[layer].number));
      name.scope = "row";
      name.title = data.layers[layer].module;
      values.forEach((value) => cell(row, "td", shorten(value)));
    });
  }

  function draw() {
    const map = mapOf(state.stat, state.group);
    find("map-title").textContent = map.title;
    find("map-unit").textContent = map.unit;
    find("map-explanation").textContent = map.explanation;
    find("choose-stat").value = state.stat;
    find("choose-group").value = map.group;
    find("choose-measure").value = state.measure;
    const legend = [];
    if (map.threshold !== null && state.measure === "mean") { legend.push("Outlined: heads with a mean above " + map.threshold + "."); }
    if (state.picked) { legend.push("Thick outline: layer " + data.layers[state.picked.layer].number + " head " + state.picked.head + "."); }
    find("map-legend").textContent = legend.join(" ");
    drawChart(map);
    if (find("numbers").open) { drawNumbers(map); }
    document.querySelectorAll(".tile").forEach(drawTile);
  }

  function choose(change) { Object.assign(state, change); draw(); }

  function chooseStat(stat) { choose({ stat: stat, picked: null, measure: mapOf(stat, state.group).measure }); }

  function csvField(value) { return /[",\n]/.test(value) ? '"' + value.replace(/"/g, '""') + '"' : value; }

  function download() {
    const lines = [["layer", "module", "head", "stat", "group"].concat(data.measures).join(",")];
    data.maps.forEach((map) => data.layers.forEach((layer, row) => {
      for (let head = 0; head < data.heads; head += 1) {
        if (map.grids.count[row][head] === null) { continue; }
        lines.push([layer.number, csvField(layer.module), head, csvField(map.stat), csvField(map.group)]
          .concat(data.measures.map((measure) => map.grids[measure][row][head] ?? "")).join(","));
      }
    }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "heads.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function fillChoosers() {
    const option = (value, text) => { const made = document.createElement("option"); made.value = value; made.textContent = text; return made; };
    const stats = new Map(data.maps.map((map) => [map.stat, map.title]));
    stats.forEach((title, stat) => find("choose-stat").append(option(stat, title)));
    data.groups.forEach((group) => find("choose-group").append(option(group, group)));
    find("group-label").hidden = data.groups.length < 2;
  }

  function print(begins) {
    state.printing = begins;
    document.documentElement.classList.toggle("print", begins);
    draw();
  }

  fillChoosers();
  find("choose-stat").addEventListener("change", (event) => chooseStat(event.target.value));
  find("choose-group").addEventListener("change", (event) => choose({ group: event.target.value }));
  find("choose-measure").addEventListener("change", (event) => choose({ measure: event.target.value }));
  const showPanel = () => find("panel").scrollIntoView({ behavior: "smooth", block: "nearest" });
  document.querySelectorAll(".tile").forEach((tile) => tile.addEventListener("click", () => {
    chooseStat(tile.dataset.stat);
    showPanel();
  }));
  document.querySelectorAll(".find").forEach((link) => link.addEventListener("click", () => {
    const layer = data.layers.findIndex((one) => String(one.number) === link.dataset.layer && one.module === link.dataset.module);
    choose({ stat: link.dataset.stat, measure: "mean", picked: { layer: layer, head: Number(link.dataset.head) } });
    showPanel();
  }));
  find("numbers").addEventListener("toggle", () => drawNumbers(mapOf(state.stat, state.group)));
  find("download").addEventListener("click", download);
  darkQuery.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  draw();
})();
