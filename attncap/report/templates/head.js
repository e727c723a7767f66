// The page of one head: its roles, its numbers beside those of all heads, how they are spread, and where it looks.
function badges(of, row, head) {
  const place = placeOf(of, row, head), held = [], near = [];
  of.roles.forEach((role) => {
    const mean = unpack(role.means)[place];
    if (!known(mean) || role.threshold === null) { return; }
    const holds = role.highest ? mean > role.threshold : mean < role.threshold;
    const text = [make("strong", {}, role.name), " " + shown(mean) + " " + role.rule];
    if (holds) { held.push(make("li.badge", { title: role.measures + " (" + role.source + ")" }, text)); }
    else { near.push({ share: role.highest ? mean / role.threshold : role.threshold / mean, role: role, mean: mean }); }
  });
  const pattern = of.patterns[place];
  if (pattern) {
    held.push(make("li.badge.quiet", { title: "Pattern after Kovaleva 2019, by rule" }, make("strong", {}, pattern[0]), " " + pattern[1]));
  }
  const closest = near.sort((one, other) => other.share - one.share)[0];
  const note = held.length > (pattern ? 1 : 0) || !closest ? null
    : "Passes the threshold of no role; closest: " + closest.role.name + ", " + shown(closest.mean) + " (" + closest.role.rule + ").";
  return [make("ul.badges", { "aria-label": "Roles" }, held), note && make("p.quiet", {}, note)];
}

function ordinal(number) {
  const teens = number % 100 > 10 && number % 100 < 14;
  return number + ((!teens && ["th", "st", "nd", "rd"][number % 10]) || "th");
}

// A strip with a tick per head's mean, this head's own marked, and below it the range of its rows.
function strip(of, stat, group, place) {
  const means = gridOf(of, stat, group, "mean"), own = means[place];
  const [from, middle, to] = ["p05", "p50", "p95"].map((measure) => gridOf(of, stat, group, measure)[place]);
  const [low, high] = boundsOf([means, [from, to]], of.stats[stat].fromZero, false);
  const x = (value) => (4 + 292 * (value - low) / (high - low)).toFixed(1);
  const ticks = Array.from(means).filter(known).map((value) => "M" + x(value) + " 3v8").join("");
  const range = known(from) ? [make("line.range", { x1: x(from), x2: x(to), y1: 18, y2: 18 }),
    make("path.median", { d: "M" + x(middle) + " 14.5v7" })] : [];
  return make("svg.strip", { viewBox: "0 0 300 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    make("path.ticks", { d: ticks }), range, make("path.own", { d: "M" + x(own) + " 0v13" }));
}

function numbersTable(of, group, row, head) {
  const place = placeOf(of, row, head), percentiles = gridOf(of, 0, group, "p50").some(known) ? ["p05", "p50", "p95"] : [];
  const columns = [["Statistic"], ["Mean", "number"], ["Rank", "number"], ["All heads’ means, this head’s rows", "picture"],
    ...percentiles.map((measure) => [{ p05: "5 %", p50: "Median", p95: "95 %" }[measure], "number.wide"])];
  const rows = of.stats.map((about, stat) => {
    const means = gridOf(of, stat, group, "mean");
    return known(means[place]) && [titled(about), make("strong", {}, shown(means[place])), rankIn(means, place),
      strip(of, stat, group, place), ...percentiles.map((measure) => shown(gridOf(of, stat, group, measure)[place]))];
  });
  return tableOf("", columns, rows.filter(Boolean));
}

// "3rd of 72": the largest is first.
function rankIn(values, place) {
  const others = Array.from(values).filter(known), above = others.filter((value) => value > values[place]).length;
  return [ordinal(above + 1), make("small", {}, " of " + others.length)];
}

function groupsTable(of, row, head) {
  const place = placeOf(of, row, head);
  const groups = of.groups.map((name, group) => [name, group]).filter(([name]) => name !== "").slice(0, 8);
  if (groups.length < 2) { return null; }
  const columns = [["Statistic"], ...groups.map(([name]) => [name, "number"])];
  const rows = of.stats.map((about, stat) =>
    [titled(about), ...groups.map(([, group]) => shown(gridOf(of, stat, group, "mean")[place]))]);
  return section("By group", "Mean of each group.", scrolled("Means by group", tableOf("plain", columns, rows)));
}

function section(title, lead, ...content) {
  if (!content.some(Boolean)) { return null; }
  return make("section.part", {}, make("h2", {}, title), lead && make("p.lead", {}, lead), content);
}

function distributions(of, row, head) {
  const details = of.details;
  if (!details) { return null; }
  const charts = details.stats.map((stat, index) => {
    const about = of.stats.find((one) => one.stat === stat), [low, high] = details.ends[index];
    const bars = part(details.shares, index, row, head), most = Math.max(...bars, 1), wide = 200 / bars.length;
    const drawn = Array.from(bars).map((share, bin) => {
      const tall = 58 * share / most;
      const box = { x: bin * wide + 0.5, width: wide - 1, y: 60 - tall, height: tall };
      return make("rect.column", Object.fromEntries(Object.entries(box).map(([name, value]) => [name, value.toFixed(1)])));
    });
    return figure(about, [smallPlot(about.title + ": " + peak(bars, low, high), drawn), ends(low, high)]);
  });
  const mean = details.of === "documents" ? "; a document counts with its mean" : "";
  return section("Distribution", "Share of " + details.of + " by value" + mean + ". The outer bins hold what lies beyond.",
    make("div.figures", {}, charts));
}

const smallPlot = (label, drawn) => make("svg", { viewBox: "0 0 200 62", role: "img", "aria-label": label },
  make("line.base", { x1: 0, x2: 200, y1: 60.5, y2: 60.5 }), drawn);

function peak(bars, low, high) {
  const bin = bars.indexOf(Math.max(...bars)), at = (place) => shown(low + (high - low) * place / bars.length, 2);
  return "most between " + at(bin) + " and " + at(bin + 1);
}

const figure = (about, content) => make("figure", {}, make("figcaption", {}, titled(about)), content);
const ends = (low, high) => make("div.ends", { "aria-hidden": "true" },
  [low, high].map((value) => make("span", {}, onAxis(value, high - low))));

// Mean over all heads of a profile, bin by bin.
function meanProfile(of, index, bins) {
  const sums = new Array(bins).fill(0), counts = new Array(bins).fill(0);
  eachHead(of, (row, head) => part(of.details.profiles, index, row, head).forEach((value, bin) => {
    if (known(value)) { sums[bin] += value; counts[bin] += 1; }
  }));
  return sums.map((sum, bin) => (counts[bin] ? sum / counts[bin] : NaN));
}

function profiles(of, row, head) {
  const details = of.details;
  if (!details || details.edges.length < 4) { return null; }
  const bins = details.edges.length - 1;
  const charts = details.stats.map((stat, index) => {
    const about = of.stats.find((one) => one.stat === stat), own = part(details.profiles, index, row, head);
    details.means = details.means || [];
    const others = details.means[index] = details.means[index] || meanProfile(of, index, bins);
    const [low, high] = boundsOf([own, others], about.fromZero, false);
    const points = (values) => Array.from(values).map((value, bin) => [200 * (bin + 0.5) / bins, 60 - 56 * (value - low) / (high - low)])
      .filter(([, y]) => known(y)).map(([x, y]) => x.toFixed(1) + "," + y.toFixed(1)).join(" ");
    const said = Array.from(own).filter(known).map((value) => shown(value));
    const label = `${about.title}: ${said[0]} at the start, ${said[said.length - 1]} at the end`;
    const drawn = [make("polyline.others", { points: points(others) }), make("polyline.line", { points: points(own) })];
    const marks = [["high", high], ["low", low]].map(([name, value]) =>
      make("span." + name, { "aria-hidden": "true" }, onAxis(value, high - low)));
    return figure(about, [make("div.plot", {}, smallPlot(label, drawn), marks), ends(details.edges[0], details.edges[bins])]);
  });
  const lead = "Mean over the " + details.over + ", in tokens (the axis widens as it goes); grey: the mean of all heads.";
  return section("Profile", lead, make("div.figures", {}, charts));
}

function receivers(of, row, head) {
  const found = of.details && of.details.receivers;
  if (!found) { return null; }
  const tokens = part(found.tokens, row, head), shares = part(found.shares, row, head);
  const items = Array.from(tokens).map((token, place) => (token < 0 ? null : make("li", {},
    make("span.token", {}, found.names[token]), make("span.meter", { "aria-hidden": "true", style: "--share:" + shares[place].toFixed(3) }),
    make("span.number", {}, (100 * shares[place]).toFixed(1) + " %"))));
  const lead = "Share of the attention on the " + found.keys + " keys that were kept of each row, over all rows.";
  return section("Tokens that receive most", lead, make("ol.receivers", {}, items));
}

function examples(of, row, head) {
  const found = of.details && of.details.examples;
  if (!found || !found.length) { return null; }
  const lead = "Shade: attention that a token receives. Point at a token, or go through them with the arrow keys, to see where it looks.";
  return section("Where it looks", lead, found.map((one) => example(one, row, head)));
}

function example(one, row, head) {
  const keys = part(one.keys, row, head), probabilities = part(one.probabilities, row, head);
  const kept = keys.length / one.tokens.length;
  const received = new Array(one.tokens.length).fill(0);
  keys.forEach((key, place) => { if (key < received.length) { received[key] += probabilities[place] / 255; } });
  const said = make("p.said", { "aria-live": "polite" }, "\u00a0"), most = Math.max(...received, 1e-9);
  const shade = (spans, shares) => spans.forEach((span, place) => {
    span.style.setProperty("--share", Math.min(1, shares[place]).toFixed(3));
  });
  const spans = one.tokens.map((text, place) => make("span.token", { tabindex: place ? -1 : 0, "data-place": place }, text));
  const rest = () => {
    shade(spans, received.map((value) => Math.sqrt(value / most)));
    spans.forEach((span) => span.classList.remove("looks"));
    said.textContent = "\u00a0";
  };
  const look = (place) => {
    const shares = new Array(one.tokens.length).fill(0), words = [];
    for (let rank = 0; rank < kept; rank += 1) {
      const key = keys[place * kept + rank], probability = probabilities[place * kept + rank] / 255;
      if (key < shares.length) { shares[key] = probability; words.push(one.tokens[key] + " " + probability.toFixed(2)); }
      else if (probability > 0) { words.push("a token that was cut " + probability.toFixed(2)); }
    }
    shade(spans, shares);
    spans.forEach((span, at) => span.classList.toggle("looks", at === place));
    said.textContent = one.tokens[place] + " looks at: " + (words.join(", ") || "nothing that was kept");
  };
  const text = make("p.text", { role: "group", "aria-label": "Document " + one.document });
  spans.forEach((span) => text.append(span, " "));
  const at = (event) => { const span = event.target.closest("[data-place]"); return span ? Number(span.dataset.place) : -1; };
  text.addEventListener("mouseover", (event) => { if (at(event) >= 0) { look(at(event)); } });
  text.addEventListener("mouseleave", rest);
  text.addEventListener("focusin", (event) => look(at(event)));
  text.addEventListener("focusout", rest);
  text.addEventListener("keydown", (event) => {
    const next = { ArrowLeft: at(event) - 1, ArrowRight: at(event) + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined || !spans[next]) { return; }
    event.preventDefault();
    event.target.tabIndex = -1;
    spans[next].tabIndex = 0;
    spans[next].focus();
  });
  rest();
  const about = "Document " + one.document + (one.group === "all" ? "" : ", " + one.group) + (one.cut ? ", its beginning" : "");
  return make("div.example", {}, make("p.quiet", {}, about), text, said);
}

// The heads that attend most alike, where an analysis measured that; else those whose means are nearest, each statistic
// in standard deviations over heads.
function alike(of, row, head) {
  const measured = of.results.find((result) => result.name === "head_distances");
  if (measured) {
    const nearest = pairsOf(of, measured, 0, row, head).reverse().slice(0, 5);
    const [about] = measured.columns;
    return section("Heads like it", measured.title + ": " + about.meaning + ", " + about.unit + ".", pairList(of, nearest));
  }
  const own = placeOf(of, row, head), mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const spreads = of.stats.map((_, stat) => {
    const means = Array.from(gridOf(of, stat, 0, "mean")).filter(known), centre = mean(means);
    return Math.sqrt(mean(means.map((value) => (value - centre) ** 2)));
  });
  const found = [];
  eachHead(of, (otherRow, otherHead) => {
    const other = placeOf(of, otherRow, otherHead);
    let sum = 0, count = 0;
    of.stats.forEach((_, stat) => {
      const means = gridOf(of, stat, 0, "mean"), apart = (means[own] - means[other]) / spreads[stat];
      if (known(apart)) { sum += apart ** 2; count += 1; }
    });
    if (other !== own && count) { found.push([otherRow, otherHead, Math.sqrt(sum / count)]); }
  });
  found.sort((one, other) => one[2] - other[2]);
  return section("Heads like it", "By the distance of their means, each statistic in standard deviations over all heads.",
    pairList(of, found.slice(0, 5)));
}

const pairList = (of, pairs) => make("ol.alike", {}, pairs.map(([row, head, value]) =>
  make("li", {}, headLink(of, row, head), make("span.quiet", {}, " " + shown(value, 2)))));

const headAddress = (number, row, head) => "#head-" + number + "-" + row + "-" + head;
const headLink = (of, row, head) =>
  make("a", { href: headAddress(page.runs.indexOf(of), row, head) }, headName(of, row, head));

function drawHead() {
  const { row, head } = state.head, of = run(), heads = [];
  eachHead(of, (...one) => heads.push(one));
  const place = heads.findIndex(([otherRow, otherHead]) => otherRow === row && otherHead === head);
  const step = (by, text) => {
    const next = heads[place + by];
    return next ? make("a", { href: headAddress(state.run, ...next), rel: by > 0 ? "next" : "prev" }, text) : "";
  };
  fill(find("head-group"), of.groups.map((_, index) => [index, groupName(of, index)]), state.group);
  find("head-group-label").hidden = of.groups.length < 2;
  find("head-steps").replaceChildren(step(-1, "← previous head"), step(1, "next head →"));
  find("head-title").textContent = headName(of, row, head).replace("layer", "Layer");
  find("head-module").textContent = [of.layers[row].module, page.runs.length > 1 && of.label,
    of.groups.length > 1 && groupName(of, state.group)].filter(Boolean).join(" · ");
  const parts = [badges(of, row, head), besideOthers(of, row, head), groupsTable(of, row, head), differencesOf(row, head),
    resultsOf(of, row, head), pairsSection(of, row, head), examples(of, row, head), receivers(of, row, head),
    distributions(of, row, head), profiles(of, row, head), alike(of, row, head)];
  find("head-content").replaceChildren(...parts.flat().filter(Boolean));
}

function besideOthers(of, row, head) {
  const rows = gridOf(of, 0, state.group, "p50").some(known);
  const lead = "Upper line: the mean of every head, this one’s marked."
    + (rows ? " Lower line: from the 5th to the 95th percentile of this head’s rows, the median marked." : "");
  return section("Beside the other heads", lead, numbersTable(of, state.group, row, head));
}
