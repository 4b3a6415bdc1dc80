"use strict";
// Texts of traces reach the page through textContent and attributes of fixed names only: nothing in them is ever parsed as HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const R = D.results, T = D.traces;
const models = [...new Set(R.map(r => r.model))], benchmarks = [...new Set(R.map(r => r.benchmark))], labels = [...new Set(R.map(r => r.series))];
const hue = model => `var(--s${models.indexOf(model) % 8})`;
const PILLARS = ["faithfulness", "utility", "coherence", "factuality"];
const ok = x => x !== null && x !== undefined;
const axis = label => R.some(r => r.series === label && r.is_frs) ? label : "quality (no FRS)";
const num = (x, d = 1) => ok(x) ? x.toFixed(d) : "–";
const pct = (x, d = 1) => ok(x) ? (100 * x).toFixed(d) : "–";
const range = (m, f = 1) => ok(m) && ok(m.low) && ok(m.high) ? `${num(f * m.low)} – ${num(f * m.high)}` : "";
const clean = s => String(s).replace(/_/g, " ");

function el(tag, attrs, ...children) { return make(document.createElement(tag), attrs, children); }
function svg(tag, attrs, ...children) { return make(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, children); }
function make(node, attrs, children) {
  for (const [key, value] of Object.entries(attrs || {})) {
    if (key === "on") for (const [name, f] of Object.entries(value)) node.addEventListener(name, f);
    else if (key === "style") Object.assign(node.style, value);
    else if (key === "tip") node.dataset.tip = value;
    else if (value === true) node.setAttribute(key, "");
    else if (ok(value) && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(9).filter(c => ok(c) && c !== false).map(c => typeof c === "number" ? String(c) : c));
  return node;
}
const main = document.getElementById("main");
const section = (...children) => { const s = el("section", {}, ...children); return s; };
const title = (text, about) => [el("h2", {}, text), about && el("p", {class: "dim small"}, about)];
function choice(label, options, then, value) {
  const select = el("select", {on: {change: () => then(select.value)}}, options.map(([v, text]) => el("option", {value: v, selected: v === value}, text)));
  return {node: el("label", {}, label, select), select};
}

// ---------------------------------------------------------------- tooltips
const tip = document.getElementById("tip");
function showTip(event) {
  const target = event.target.closest && event.target.closest("[data-tip]");
  if (!target) { tip.hidden = true; return; }
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = `${Math.max(4, Math.min(innerWidth - w - 4, event.clientX + 12))}px`;
  tip.style.top = `${event.clientY + 18 + h > innerHeight ? event.clientY - h - 10 : event.clientY + 18}px`;
}
document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);

// ---------------------------------------------------------------- tables
function table(columns, rows, start, up) {
  // columns: {name, left, get: row -> sortable value, show: row -> children}
  const body = el("tbody");
  let by = start || 0, down = !columns[by].left && !up;
  const fill = () => {
    const value = columns[by].get || (() => 0);
    const sorted = [...rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (!ok(x) || !ok(y)) return ok(y) - ok(x);
      return (down ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
    body.replaceChildren(...sorted.map(row => el("tr", {}, columns.map(c => el("td", {class: c.left && "name"}, c.show(row))))));
    heads.forEach((h, i) => h.setAttribute("aria-sort", i === by ? (down ? "descending" : "ascending") : "none"));
  };
  const heads = columns.map((c, i) => el("th", {class: c.left && "name", scope: "col"}, c.get ? el("button", {type: "button", tip: c.tip, on: {click: () => {
    if (by === i) down = !down; else { by = i; down = !c.left; }
    fill();
  }}}, c.name) : c.name));
  const whole = el("div", {class: "wide"}, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
  fill();
  return whole;
}
const dot = model => el("span", {style: {color: hue(model)}, "aria-hidden": "true"}, "● ");

function leaderboard(label) {
  const mine = R.filter(r => r.series === label), own = [...new Set(mine.map(r => r.model))], sets = [...new Set(mine.map(r => r.benchmark))];
  const at = (model, set) => mine.find(r => r.model === model && r.benchmark === set);
  const mean = model => {
    const values = sets.map(s => at(model, s)).map(r => r && r.frs.value);
    return values.every(ok) ? values.reduce((a, b) => a + b, 0) / values.length : null;
  };
  const meanRange = model => D.comparison && label === labels[0] ? ((D.comparison.leaderboard || []).find(r => r.model === model) || {}).mean : null;
  const cell = r => !r ? "–" : [el("b", {}, num(r.frs.value)), el("span", {class: "small dim"}, range(r.frs)), el("span", {class: "small dim"}, `pass@1 ${pct(r.pass_at_1.value)}`)];
  const columns = [{name: "model", left: true, get: m => m, show: m => [dot(m), m]}];
  if (sets.length > 1) columns.push({name: "mean", get: mean, show: m => [el("b", {}, num(mean(m))), el("span", {class: "small dim"}, range(meanRange(m)))], tip: "unweighted mean over the benchmarks; – where one is missing"});
  for (const s of sets) columns.push({name: s, get: m => { const r = at(m, s); return r && r.frs.value; }, show: m => cell(at(m, s))});
  const isFrs = mine[0].is_frs;
  const about = isFrs ? `Quality of reasoning, 0 to 100, over the ${num(100 * mine[0].k, 0)} % of traces that each model is most confident of; below it the 95 % interval and the accuracy of all traces.`
    : "This scorer is no language-model judge: its numbers are a baseline and no Filtered Reasoning Score.";
  return section(title(`Leaderboard: ${label}`, about), table(columns, own, 1));
}

function details() {
  const lost = r => Object.entries(r.dropped || {}).filter(([, n]) => n).map(([why, n]) => `${n} × ${why}`).join("; ");
  const m = (name, key, f = 1) => ({name, get: r => r[key] && r[key].value, show: r => r[key] && ok(r[key].value) ? [num(f * r[key].value), el("span", {class: "small dim"}, range(r[key], f))] : "–"});
  return section(title("All figures", "Accuracies are of the same traces. Click a heading to sort."), table([
    {name: "model", left: true, get: r => r.model, show: r => [dot(r.model), r.model]}, {name: "benchmark", left: true, get: r => r.benchmark, show: r => r.benchmark},
    {name: "score", left: true, get: r => r.series, show: r => r.series}, {name: "K", get: r => r.k, show: r => `${num(100 * r.k, 0)} %`},
    m("kept set", "frs"), m("unfiltered", "unfiltered"), m("one trace a problem", "single_trace"), m("gain of the most confident", "gain"),
    {name: "right among kept, %", get: r => (r.top_accuracy || {})[String(r.k)], show: r => pct((r.top_accuracy || {})[String(r.k)])},
    m("pass@1, %", "pass_at_1", 100), m("mean@k, %", "mean_at_k", 100), {name: "ECE", get: r => r.ece, show: r => num(r.ece, 3)},
    {name: "traces", get: r => r.traces, show: r => r.traces}, {name: "problems", get: r => r.problems, show: r => r.problems},
    {name: "judged", get: r => r.judged_n, show: r => r.judged_n}, {name: "judge", left: true, get: r => String((r.judge || {}).name || ""), show: r => String((r.judge || {}).name || "–")},
    {name: "left out", left: true, show: r => lost(r) || "nothing"},
  ], R, 4));
}

// ---------------------------------------------------------------- charts
function chart(draw, height = 320) {
  const box = el("div", {class: "chart"});
  let drawn = 0;
  const again = () => { const w = box.clientWidth; if (w > 60) { drawn = w; box.replaceChildren(draw(w, Math.max(260, Math.min(height, w * .8)))); } };
  new ResizeObserver(() => requestAnimationFrame(() => { if (box.clientWidth !== drawn) again(); })).observe(box);
  box.again = again;
  return box;
}
function ticks(low, high, n) {
  const step0 = (high - low) / n, power = 10 ** Math.floor(Math.log10(step0)), step = [1, 2, 2.5, 5, 10].map(s => s * power).find(s => s >= step0);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9; k++) found.push(+(k * step).toPrecision(10));
  return found;
}
function frame(w, h, x, y, xName, yName, fx = String, fy = String) {
  const L = 54, B = 40, top = 8, right = 12;
  const X = v => L + (v - x.low) / (x.high - x.low) * (w - L - right), Y = v => h - B - (v - y.low) / (y.high - y.low) * (h - B - top);
  const g = svg("svg", {viewBox: `0 0 ${w} ${h}`, height: h, role: "img", "aria-label": `${yName} against ${xName}`});
  for (const t of x.ticks || ticks(x.low, x.high, w < 420 ? 4 : 7)) g.append(svg("line", {class: "grid", x1: X(t), x2: X(t), y1: top, y2: h - B}), svg("text", {x: X(t), y: h - B + 16, "text-anchor": "middle"}, fx(t)));
  for (const t of y.ticks || ticks(y.low, y.high, 5)) g.append(svg("line", {class: "grid", x1: L, x2: w - right, y1: Y(t), y2: Y(t)}), svg("text", {x: L - 6, y: Y(t) + 4, "text-anchor": "end"}, fy(t)));
  g.append(svg("text", {class: "label", x: (L + w - right) / 2, y: h - 6, "text-anchor": "middle"}, xName), svg("text", {class: "label", x: 12, y: (h - B) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(h - B) / 2})`}, yName));
  return {g, X, Y};
}
function span(values, low = 0, high = 100, pad = .06) {
  const v = values.filter(ok);
  if (!v.length) return {low, high};
  let a = Math.min(...v), b = Math.max(...v);
  const room = Math.max((b - a) * pad, (high - low) * .04);
  a = Math.max(low, a - room); b = Math.min(high, b + room);
  return b - a < (high - low) * .02 ? {low, high} : {low: a, high: b};
}
const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
function mark(shape, x, y, r, attrs) {
  const path = {
    circle: `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`, square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    triangle: `M${x},${y - r * 1.2}l${r * 1.15},${r * 2.1}h${-r * 2.3}z`, diamond: `M${x},${y - r * 1.3}l${r * 1.2},${r * 1.3}l${-r * 1.2},${r * 1.3}l${-r * 1.2},${-r * 1.3}z`,
    cross: `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`,
  }[shape];
  return svg("path", {d: path, ...attrs, ...(shape === "cross" ? {fill: "none", "stroke-width": 2} : {})});
}
const shapeOf = benchmark => SHAPES[benchmarks.indexOf(benchmark) % SHAPES.length];
function legend(names, sets) {
  const icon = (shape, c) => svg("svg", {viewBox: "0 0 14 14"}, mark(shape, 7, 7, 5, {fill: c, stroke: c}));
  return el("div", {class: "legend"}, names.map(m => el("span", {}, icon("circle", hue(m)), m)), sets && sets.length > 1 ? sets.map(s => el("span", {class: "dim"}, icon(shapeOf(s), "var(--dim)"), s)) : []);
}

function scatter(label) {
  const mine = R.filter(r => r.series === label && ok(r.frs.value) && ok(r.pass_at_1.value));
  if (!mine.length) return section(title("Accuracy against quality"), el("p", {class: "dim"}, "No trace has been graded, so there is no accuracy to show."));
  const box = chart((w, h) => {
    const xs = span(mine.flatMap(r => [r.pass_at_1.low, r.pass_at_1.value, r.pass_at_1.high]).map(v => ok(v) ? 100 * v : null));
    const ys = span(mine.flatMap(r => [r.frs.low, r.frs.value, r.frs.high]));
    const {g, X, Y} = frame(w, h, xs, ys, "pass@1 of the same traces, %", axis(label));
    for (const r of mine) {
      const x = X(100 * r.pass_at_1.value), y = Y(r.frs.value), c = hue(r.model), text = `${r.model}\n${r.benchmark}\n${label} ${num(r.frs.value)} [${range(r.frs)}]\npass@1 ${pct(r.pass_at_1.value)} [${range(r.pass_at_1, 100)}]`;
      if (ok(r.frs.low)) g.append(svg("line", {x1: x, x2: x, y1: Y(r.frs.low), y2: Y(r.frs.high), stroke: c, "stroke-width": 1.5, opacity: .55}));
      if (ok(r.pass_at_1.low)) g.append(svg("line", {y1: y, y2: y, x1: X(100 * r.pass_at_1.low), x2: X(100 * r.pass_at_1.high), stroke: c, "stroke-width": 1.5, opacity: .55}));
      g.append(mark(shapeOf(r.benchmark), x, y, 6, {fill: c, stroke: c, tip: text}));
    }
    return g;
  });
  return section(title("Accuracy against quality", "One mark a model and benchmark; lines are 95 % intervals."), box, legend([...new Set(mine.map(r => r.model))], [...new Set(mine.map(r => r.benchmark))]));
}

function curves(label) {
  const mine = R.filter(r => r.series === label), sets = [...new Set(mine.map(r => r.benchmark))];
  let set = sets[0], dashed = true;
  const box = chart((w, h) => {
    const rows = mine.filter(r => r.benchmark === set);
    const of = r => Object.entries(r.by_k).map(([k, m]) => [100 * k, m]).filter(([, m]) => ok(m.value)).sort((a, b) => a[0] - b[0]);
    const right = r => Object.entries(r.top_accuracy || {}).filter(([, v]) => ok(v)).map(([k, v]) => [100 * k, 100 * v]).sort((a, b) => a[0] - b[0]);
    const ys = span(rows.flatMap(r => [...of(r).flatMap(([, m]) => [m.low, m.value, m.high]), ...(dashed ? right(r).map(p => p[1]) : [])]));
    const {g, X, Y} = frame(w, h, {low: 0, high: 100}, ys, "K: share of the most confident traces kept, %", axis(label));
    const path = points => points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join("");
    for (const r of rows) {
      const c = hue(r.model), line = of(r), band = line.filter(([, m]) => ok(m.low));
      if (band.length > 1) g.append(svg("path", {d: `${path(band.map(([k, m]) => [k, m.high]))}L${path(band.map(([k, m]) => [k, m.low]).reverse()).slice(1)}Z`, fill: c, opacity: .13}));
      if (dashed) g.append(svg("path", {d: path(right(r)), fill: "none", stroke: c, "stroke-width": 1.5, "stroke-dasharray": "5 4"}));
      g.append(svg("path", {d: path(line.map(([k, m]) => [k, m.value])), fill: "none", stroke: c, "stroke-width": 2}));
      for (const [k, m] of line) g.append(mark("circle", X(k), Y(m.value), k === 100 * r.k ? 5.5 : 3.5, {fill: c, stroke: c, tip: `${r.model}\nK = ${num(k, 0)} %: ${num(m.value)} [${range(m)}]\n${m.n} of ${m.of} judged`}));
    }
    return g;
  });
  const pick = choice("benchmark", sets.map(s => [s, s]), v => { set = v; box.again(); }, set);
  const check = el("input", {type: "checkbox", checked: true, on: {change: () => { dashed = check.checked; box.again(); }}});
  return section(title("How it depends on K", "Quality of the kept traces, with 95 % bands; dashed: the share of them that is right."),
    el("div", {class: "controls"}, sets.length > 1 && pick.node, el("label", {}, check, "share that is right, %")), box, legend([...new Set(mine.map(r => r.model))]));
}

function cloud() {
  const mine = R.filter(r => r.points.length);
  if (!mine.length) return null;
  let r = mine[0];
  const said = el("p", {class: "dim small"});
  const box = chart((w, h) => {
    const xs = span(r.points.map(p => p[0]), 0, 1), {g, X, Y} = frame(w, h, xs, {low: -.06, high: 1.06, ticks: [0, .25, .5, .75, 1]}, "confidence of the trace", "quality by the judge");
    r.points.forEach(([c, q, correct, id], i) => {
      const y = Y(q) + (((i * 7919) % 101) / 101 - .5) * 12, verdict = !ok(correct) ? "not graded" : correct >= threshold(r) ? "right" : "wrong";
      const colour = verdict === "right" ? "var(--s0)" : verdict === "wrong" ? "var(--s1)" : "var(--dim)";
      const open = T.findIndex(t => R[t.r] === r && t.id === id);
      g.append(mark(verdict === "wrong" ? "cross" : "circle", X(c), y, 3.2, {fill: colour, stroke: colour, opacity: .6, tip: `${id}\nconfidence ${num(c, 3)}, quality ${num(q, 3)}, ${verdict}${open >= 0 ? "\nclick to read it" : ""}`,
        style: {cursor: open >= 0 ? "pointer" : "default"}, on: open >= 0 ? {click: () => showTrace(open, true)} : {}}));
    });
    const sorted = [...r.points].sort((a, b) => a[0] - b[0]), n = Math.min(10, Math.floor(sorted.length / 5)), groups = [];
    for (let j = 0; j < n; j++) {
      const part = sorted.slice(Math.floor(j * sorted.length / n), Math.floor((j + 1) * sorted.length / n)), m = part.reduce((s, p) => s + p[1], 0) / part.length;
      const sd = Math.sqrt(part.reduce((s, p) => s + (p[1] - m) ** 2, 0) / Math.max(1, part.length - 1)), se = 1.96 * sd / Math.sqrt(part.length);
      groups.push([part.reduce((s, p) => s + p[0], 0) / part.length, m, se, part.length]);
    }
    if (groups.length > 1) g.append(svg("path", {d: groups.map(([x, m], i) => `${i ? "L" : "M"}${X(x)},${Y(m)}`).join(""), fill: "none", stroke: "var(--ink)", "stroke-width": 2}));
    for (const [x, m, se, k] of groups) g.append(svg("line", {x1: X(x), x2: X(x), y1: Y(Math.max(-.05, m - se)), y2: Y(Math.min(1.05, m + se)), stroke: "var(--ink)", "stroke-width": 1.5}), mark("square", X(x), Y(m), 4, {fill: "var(--panel)", stroke: "var(--ink)", "stroke-width": 2, tip: `mean of ${k} traces: ${num(m, 3)} ± ${num(se, 3)}`}));
    said.textContent = `${r.points.length} judged traces${r.points_step > 1 ? `, every ${r.points_step}th of ${r.judged_n}` : ""}. Black: means of ${n || "no"} equal groups with 95 % intervals. Heights are spread a little so that equal ones do not hide each other.`;
    return g;
  });
  const pick = choice("result", mine.map((m, i) => [String(i), `${m.model} · ${m.benchmark}${labels.length > 1 ? ` · ${m.series}` : ""}`]), v => { r = mine[+v]; box.again(); }, "0");
  const icon = (shape, c, text) => el("span", {}, svg("svg", {viewBox: "0 0 14 14"}, mark(shape, 7, 7, 4, {fill: c, stroke: c})), text);
  return section(title("Confidence against quality"), el("div", {class: "controls"}, mine.length > 1 && pick.node), box,
    el("div", {class: "legend"}, icon("circle", "var(--s0)", "right"), icon("cross", "var(--s1)", "wrong"), icon("circle", "var(--dim)", "not graded")), said);
}
const threshold = r => ok((r.settings || {}).threshold) ? r.settings.threshold : 1;

function dimensions(label) {
  const mine = R.filter(r => r.series === label && r.pillars.all.n), sets = [...new Set(mine.map(r => r.benchmark))];
  if (!mine.length) return null;
  let set = sets[0];
  const box = chart((w, h) => {
    const rows = mine.filter(r => r.benchmark === set), L = w < 420 ? 84 : 100, right = 34, group = Math.max(26, rows.length * 17 + 14), H = 4 * group + 30;
    const X = v => L + (v - 1) / 4 * (w - L - right);
    const g = svg("svg", {viewBox: `0 0 ${w} ${H}`, height: H, role: "img", "aria-label": "mean scores by dimension"});
    for (const t of [1, 2, 3, 4, 5]) g.append(svg("line", {class: "grid", x1: X(t), x2: X(t), y1: 0, y2: 4 * group}), svg("text", {x: X(t), y: 4 * group + 16, "text-anchor": "middle"}, t));
    PILLARS.forEach((p, i) => {
      g.append(svg("text", {class: "label", x: L - 8, y: i * group + group / 2 + 4, "text-anchor": "end"}, p));
      rows.forEach((r, j) => {
        const kept = r.pillars.kept[p], all = r.pillars.all[p], y = i * group + 7 + j * 17, c = hue(r.model), text = `${r.model}, ${p}\nkept: ${num(kept, 2)} (${r.pillars.kept.n} traces)\nall judged: ${num(all, 2)} (${r.pillars.all.n})`;
        if (ok(kept)) g.append(svg("rect", {x: X(1), y, width: Math.max(1, X(kept) - X(1)), height: 12, rx: 2, fill: c, opacity: .85, tip: text}), svg("text", {x: X(Math.max(kept, ok(all) ? all : 0)) + 6, y: y + 10}, num(kept, 1)));
        if (ok(all)) g.append(svg("line", {x1: X(all), x2: X(all), y1: y - 2, y2: y + 14, stroke: "var(--ink)", "stroke-width": 2, tip: text}));
      });
    });
    return g;
  });
  const pick = choice("benchmark", sets.map(s => [s, s]), v => { set = v; box.again(); }, set);
  return section(title("The four dimensions", "Bars: mean score, 1 to 5, of the kept traces. Black strokes: of all that were judged."), el("div", {class: "controls"}, sets.length > 1 && pick.node), box, legend([...new Set(mine.map(r => r.model))]));
}

function selected() {
  const seen = new Set(), rows = R.filter(r => { const key = r.model + "\0" + r.benchmark; return !seen.has(key) && seen.add(key); });
  const c = (name, key, f) => ({name, get: r => (r.composition || {})[key], show: r => f((r.composition || {})[key])});
  const d = (name, key, f) => ({name: `${name}: kept / pool`, get: r => ((r.diagnostics || {})[key] || {}).kept, show: r => { const x = (r.diagnostics || {})[key] || {}; return [`${f(x.kept)} / ${f(x.pool)}`, el("span", {class: "small dim"}, ok(x.with_confidence) ? `corr. ${num(x.with_confidence, 2)}` : "")]; }});
  return section(title("What the filter selected", "Whether confidence picked reasoning, or only easy problems, long texts and repetitions. corr.: Pearson correlation with confidence, over all traces."), table([
    {name: "model", left: true, get: r => r.model, show: r => [dot(r.model), r.model]}, {name: "benchmark", left: true, get: r => r.benchmark, show: r => r.benchmark},
    c("kept", "kept", x => num(x, 0)), c("problems with a kept trace, %", "problem_share", pct), c("most of one problem", "most", x => num(x, 0)), c("of always-solved problems, %", "always_solved", pct),
    d("tokens", "length", x => num(x, 0)), d("repeated 4-grams, %", "repetition", pct), d("repeated tails, %", "repeated_tails", pct), d("cut off, %", "truncation", pct),
  ], rows, 0));
}

function comparison() {
  const C = D.comparison;
  if (!C) return null;
  const parts = [], part = (name, about, ...nodes) => parts.push(el("h3", {}, name), about && el("p", {class: "dim small"}, about), ...nodes);
  const col = (name, key, d = 1) => ({name, get: r => r[key], show: r => typeof r[key] === "number" ? num(r[key], d) : ok(r[key]) ? String(r[key]) : "–"});
  const text = (name, key) => ({name, left: true, get: r => String(r[key]), show: r => String(r[key])});
  const some = list => Array.isArray(list) && list.length > 0;
  const level = C.label ? `${C.label}, K = ${num(100 * C.k, 0)} %` : "";
  if (some(C.pairs)) part("Two models on one benchmark", `Difference of the first and the second (${level}, points) by a paired bootstrap over their common problems.`, table([
    text("first", "a"), text("second", "b"), text("benchmark", "benchmark"), {name: "difference", get: r => r.difference, show: r => ok(r.difference) ? [el("b", {}, num(r.difference)), el("span", {class: "small dim"}, range(r))] : "–"},
    col("p", "p", 3), col("problems", "problems", 0), col("in both kept sets", "paired", 0)], C.pairs, 3));
  if (some(C.ties)) part("Pairs tied in accuracy", "Mean gaps, in points, between models whose pass@1 differs by no more than this. The ratio has a small number below it by construction.", C.ties.some(t => t.pairs) ? table([
    col("tied within", "points", 0), col("pairs", "pairs", 0), col("gap in quality", "score_gap"), col("gap in pass@1", "accuracy_gap"), col("ratio", "ratio"), col("gap, unfiltered", "unfiltered_gap"), col("gap, single traces", "single_trace_gap")], C.ties, 0, true)
    : el("p", {}, "No two of these models are tied within 5 points."));
  if (some(C.transfer) && !C.transfer.some(r => ok(r.spearman) || ok(r.pearson))) part("Does a ranking carry over to another benchmark?", "", el("p", {}, "That takes several models on several benchmarks."));
  else if (some(C.transfer)) part("Does a ranking carry over to another benchmark?", "Leave one benchmark out: correlation, over models, of the mean on the others with the value on it. Few models make it worth little.", table([
    text("from the others'", "from"), text("to the left-out one's", "to"), col("Spearman", "spearman", 3), col("Pearson", "pearson", 3), {name: "models", get: r => some(r.folds) ? r.folds[0].models : null, show: r => some(r.folds) ? r.folds[0].models : "–"}], C.transfer, 2));
  if (some(C.k_sensitivity) && some(C.models)) part("Model means by K", "The correlation is of the models' ranks with those at the headline's K.", table([
    {name: "K", get: r => r.k, show: r => `${num(100 * r.k, 0)} %`}, ...C.models.map(m => ({name: m, get: r => (r.means || {})[m], show: r => num((r.means || {})[m])})), col("Spearman", "spearman", 3)], C.k_sensitivity, 0, true));
  const f = C.filter_against_single;
  if (f && f.pairs) part("Filter against single traces", "", el("p", {}, `${f.reversed} of ${f.pairs} pairs of models that differ by at least ${num(f.points, 0)} points in both are ordered the other way round by one judged trace a problem.`));
  const g = C.selection;
  if (g && ok(g.mean)) part("Does confidence choose within a problem?", `Quality of a problem's most confident trace less that of a random one: ${num(g.mean)} points on average over ${g.pairs} pairs of model and benchmark. Correlations over those pairs:`, table([
    text("what goes with the gain", "predictor"), col("Pearson", "pearson", 3), col("pairs", "pairs", 0)], g.predictors, 0));
  const agree = a => a && a.all ? {traces: a.traces, ...a.all} : {};
  if (some(C.judges)) part("Other judges", `Against the first one (${level}).`, table([
    text("judge", "judge"), text("its score", "label"), ...(C.models || []).map(m => ({name: m, get: r => (r.means || {})[m], show: r => num((r.means || {})[m])})), col("Spearman", "spearman", 3), col("mean difference", "difference"),
    ...[["traces", "traces", 0], ["same score, %", "exact", 1, 100], ["within one, %", "within_one", 1, 100], ["Pearson", "pearson", 2], ["weighted kappa", "kappa", 2]].map(([name, key, d, f = 1]) => ({name, get: r => agree(r.agreement)[key], show: r => { const v = agree(r.agreement)[key]; return ok(v) ? num(f * v, d) : "–"; }}))], C.judges, 0));
  const persons = R.flatMap(r => Object.entries((r.judge || {}).agreement || {}).map(([other, a]) => ({who: `${r.model} · ${r.benchmark} · ${(r.judge || {}).name || r.label}`, other, ...agree(a)})));
  if (persons.length) part("Agreement on single traces", "Scores of 1 to 5 on the same traces, all four dimensions together.", table([text("result", "who"), text("other judge or person", "other"), col("traces", "traces", 0),
    {name: "same score, %", get: r => r.exact, show: r => pct(r.exact)}, {name: "within one, %", get: r => r.within_one, show: r => pct(r.within_one)}, col("Pearson", "pearson", 2), col("weighted kappa", "kappa", 2)], persons, 0));
  const known = ["label", "k", "models", "benchmarks", "leaderboard", "ties", "transfer", "k_sensitivity", "filter_against_single", "selection", "pairs", "judges", "notes"];
  const rest = Object.fromEntries(Object.entries(C).filter(([key]) => !known.includes(key)));
  if (Object.keys(rest).length) parts.push(generic(rest));
  return parts.length ? section(title("Comparison"), el("div", {class: "generic"}, parts)) : null;
}

function generic(value, depth = 0) {
  // comparisons of whatever shape: lists of flat objects as tables, other objects by key
  if (Array.isArray(value) && value.length && value.every(v => v && typeof v === "object" && !Array.isArray(v))) {
    const keys = [...new Set(value.flatMap(Object.keys))];
    return table(keys.map(k => ({name: clean(k), left: typeof value[0][k] === "string", get: typeof value[0][k] === "object" ? null : v => v[k], show: v => generic(v[k], depth + 1)})), value, 0);
  }
  if (value && typeof value === "object" && !Array.isArray(value)) {
    const entries = Object.entries(value);
    if (ok(value.value) && "low" in value) return `${num(value.value, 2)}${ok(value.low) ? ` [${num(value.low, 2)}, ${num(value.high, 2)}]` : ""}`;
    if (depth > 1 || entries.every(([, v]) => v === null || typeof v !== "object")) return el("div", {class: "wide"}, el("table", {}, el("tbody", {}, entries.map(([k, v]) => el("tr", {}, el("td", {class: "name dim"}, clean(k)), el("td", {}, generic(v, depth + 1)))))));
    return entries.map(([k, v]) => el("div", {}, el("h3", {}, clean(k)), generic(v, depth + 1)));
  }
  if (Array.isArray(value)) return value.map(v => typeof v === "object" ? JSON.stringify(v) : String(v)).join(", ");
  return typeof value === "number" ? (Number.isInteger(value) ? String(value) : value.toFixed(3)) : ok(value) ? String(value) : "–";
}
