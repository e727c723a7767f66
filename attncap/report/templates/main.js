// Which page is shown, themes, printing, downloads.
function openHead(number, row, head) { location.hash = headAddress(number, row, head); }

function drawAll() {
  if (state.head) { drawHead(); return; }
  if (run().stats.length) { drawTiles(); drawPanel(); }
  page.comparisons.forEach((_, number) => drawComparison(number));
  page.runs.forEach((of, number) => of.results.forEach((result, place) => drawResult(of, result, find("result-" + number + "-" + place))));
}

function route() {
  const found = /^#head-(\d+)-(\d+)-(\d+)$/.exec(location.hash), [number, row, head] = (found || []).slice(1).map(Number);
  const of = found && page.runs[number], there = of && of.layers[row] && head < of.layers[row].heads;
  const before = state.head;
  state.head = there ? { row: row, head: head } : null;
  if (there && number !== state.run) { chooseRun(number); }
  find("overview").hidden = Boolean(there);
  find("head").hidden = !there;
  hideTip();
  drawAll();
  if (there) { window.scrollTo(0, 0); find("head-title").focus({ preventScroll: true }); }
  else if (before) {
    const place = find("chart").querySelector(`[data-row="${before.row}"][data-head="${before.head}"]`);
    if (place) { place.tabIndex = 0; place.focus(); }
  }
}

function downloads() {
  const of = run(), name = page.runs.length > 1 ? of.label.replace(/[^\w.-]+/g, "_") + "_heads" : "heads";
  find("save-csv").addEventListener("click", () => saveCsv(name + ".csv", ROW_HEADER, rowsOf(run())));
  find("save-json").addEventListener("click", () => {
    const named = (row) => Object.fromEntries(row.map((value, place) => [ROW_HEADER[place], Number.isNaN(value) ? null : value]));
    saveJson(name + ".json", { model: run().model, corpus: run().corpus, heads: rowsOf(run()).map(named) });
  });
  page.comparisons.forEach((found, number) => find("comparison-" + number).querySelector(".save").addEventListener("click", () => {
    const rows = [];
    found.stats.forEach((about, stat) => eachHead(found, (row, head) => {
      const numbers = found.measures.map((_, at) => part(found.numbers, stat, at)[placeOf(found, row, head)]);
      if (known(numbers[0])) { rows.push([found.layers[row].number, found.layers[row].module, head, about.stat, ...numbers]); }
    }));
    saveCsv("comparison.csv", ["layer", "module", "head", "stat", ...found.columns], rows);
  }));
  page.runs.forEach((of_, number) => of_.results.forEach((result, place) => {
    const button = find("result-" + number + "-" + place).querySelector(".save");
    button.addEventListener("click", () => saveCsv(result.name + ".csv", ...resultRows(of_, result)));
  }));
}

function resultRows(of, result) {
  const names = result.columns.map((one) => one.name);
  const numbers = (...at) => result.columns.map((_, column) => part(result.numbers, column, ...at));
  const where = ([row, head]) => [of.layers[row].number, of.layers[row].module, head];
  if (result.kind === "curve") { return [names, Array.from(numbers()[0]).map((_, at) => numbers().map((values) => values[at]))]; }
  if (result.kind === "pairs") {
    const all = numbers();
    return [["layer", "module", "head", "other_layer", "other_module", "other_head", ...names],
      Array.from(all[0]).map((_, at) => [...pairPlaces(of, result, at).flatMap(where), ...all.map((values) => values[at])])];
  }
  const rows = [];
  result.groups.forEach((group, place) => {
    const all = numbers(place);
    eachHead(of, (row, head) => {
      const values = all.map((one) => one[placeOf(of, row, head)]);
      if (values.some(known)) { rows.push([...where([row, head]), group, ...values]); }
    });
  });
  return [["layer", "module", "head", "group", ...names], rows];
}

function setUp() {
  const listenTo = (id, f) => find(id).addEventListener("change", (event) => f(event.target.value));
  fillChoosers();
  listenTo("choose-run", (value) => chooseRun(Number(value)));
  listenTo("choose-stat", (value) => chooseStat(Number(value)));
  listenTo("choose-group", (value) => choose({ group: Number(value) }));
  listenTo("choose-less", (value) => choose({ less: Number(value) }));
  listenTo("choose-measure", (value) => choose({ measure: value }));
  listenTo("head-group", (value) => { state.group = Number(value); drawHead(); });
  page.comparisons.forEach((_, number) => find("comparison-" + number).querySelectorAll("select").forEach((select) =>
    select.addEventListener("change", () => drawComparison(number))));
  page.runs.forEach((of, number) => of.results.forEach((result, place) => {
    const box = find("result-" + number + "-" + place);
    box.querySelectorAll("select").forEach((select) => select.addEventListener("change", () => drawResult(of, result, box)));
  }));
  const first = run().stats.findIndex((about) => gridOf(run(), run().stats.indexOf(about), 0, about.measure).some(known));
  if (run().stats.length) { state.stat = Math.max(0, first); state.measure = run().stats[state.stat].measure; }
  find("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; drawAll(); });
  downloads();
  darkQuery.addEventListener("change", drawAll);
  window.addEventListener("hashchange", route);
  const print = (begins) => { if (state.printing !== begins) { state.printing = begins; drawAll(); } };
  window.matchMedia("print").addEventListener("change", (event) => print(event.matches));
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  let width = window.innerWidth, waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (window.innerWidth !== width) { width = window.innerWidth; drawAll(); } }, 150);
  });
  route();
}

setUp();
