// ---------------------------------------------------------------- traces
const state = {model: "", benchmark: "", label: "", verdict: "", set: "", quality: "", text: "", sort: "confidence", at: -1, more: 100};
const RUN = D.view === "run", WORD = RUN ? "reward" : "quality";
const list = el("div", {class: "list", role: "list", "aria-label": "traces"}), detail = el("div", {id: "trace"}), counted = el("span", {class: "dim small"});
const verdictOf = t => !ok(t.correct) ? "none" : t.correct >= threshold(R[t.r]) ? "right" : "wrong";
const textOf = t => t.tokens ? t.tokens.join("") : t.text || "";
T.forEach((t, i) => { t.i = i; t.hay = `${t.id}\n${t.prompt || ""}\n${textOf(t)}\n${t.reasons || ""}`.toLowerCase(); });
const SORTS = {
  confidence: ["most confident first", t => -t.confidence], unsure: ["least confident first", t => t.confidence], best: [`best ${WORD} first`, t => ok(t.quality) ? -t.quality : 9],
  worst: [`worst ${WORD} first`, t => ok(t.quality) ? t.quality : 9], surprise: ["confident but poor first", t => ok(t.quality) ? t.quality - t.confidence : 9],
  long: ["longest first", t => -(t.length || 0)], problem: ["by problem", t => t.problem],
};
function matching() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean), key = SORTS[state.sort][1];
  const good = T.filter(t => {
    const r = R[t.r], q = t.quality;
    return (!state.model || r.model === state.model) && (!state.benchmark || r.benchmark === state.benchmark) && (!state.label || r.series === state.label)
      && (!state.verdict || verdictOf(t) === state.verdict) && (!state.set || (state.set === "kept") === t.kept)
      && (!state.quality || (state.quality === "failed" ? !ok(q) : ok(q) && (state.quality === "high" ? q >= .75 : state.quality === "low" ? q < .5 : q >= .5 && q < .75)))
      && words.every(w => t.hay.includes(w));
  });
  return good.sort((a, b) => { const x = key(a), y = key(b); return (typeof x === "string" ? x.localeCompare(y) : x - y) || a.rank - b.rank || a.i - b.i; });
}
function verdictMark(t) { const v = verdictOf(t); return el("span", {class: v === "none" ? "dim" : v}, v === "right" ? "✓ right" : v === "wrong" ? "✗ wrong" : "not graded"); }
function fillList() {
  const found = matching();
  counted.textContent = `${found.length} of ${T.length} traces`;
  list.replaceChildren(...found.slice(0, state.more).map(t => el("button", {class: "item", type: "button", "aria-current": t.i === state.at ? "true" : "false", "data-i": t.i, on: {click: () => showTrace(t.i, true)}},
    el("span", {class: "top"}, el("span", {}, dot(R[t.r].model), `conf ${num(t.confidence, 2)}`, ok(t.quality) ? ` · ${WORD} ${num(t.quality, 2)}` : ` · no ${RUN ? WORD : "score"}`), verdictMark(t)),
    el("span", {class: "snip"}, `${t.problem}${ok(t.sample) ? ` #${t.sample}` : ""}  ${(t.prompt || textOf(t)).slice(0, 120).replace(/\s+/g, " ")}`))));
  if (found.length > state.more) list.append(el("button", {class: "item", type: "button", on: {click: () => { state.more += 200; fillList(); }}}, `${found.length - state.more} more …`));
  if (!found.length) list.append(el("p", {class: "dim", style: {padding: "8px 12px"}}, "No trace matches."));
  return found;
}
function tokenSpans(t) {
  const low = new Set(t.low), spans = [];
  t.tokens.forEach((text, i) => {
    if (t.gap && i === t.gap[0]) spans.push(el("span", {class: "gap"}, `${t.gap[1]} tokens left out of this page`));
    const p = t.p[i], heat = Math.min(.85, -Math.log(Math.max(p, 1e-9)) / 6), kind = [];
    if (low.has(i)) {
      kind.push("low");
      if (text === "") kind.push("empty"); else if (/^\s*\n\s*$/.test(text)) kind.push("nl"); else if (/^\s+$/.test(text)) kind.push("sp");
    }
    spans.push(el("span", {class: kind.join(" ") || null, style: heat > .015 ? {background: `rgb(var(--heat) / ${heat.toFixed(3)})`} : {}, tip: `p = ${p >= .0995 ? p.toFixed(3) : p.toPrecision(2)}${low.has(i) ? "\namong the least likely, which the confidence is taken from" : ""}`}, text));
  });
  return spans;
}
function judged(t, r) {
  return [
    el("h3", {}, ok(t.quality) ? `Judge (${r.series}): ${num(100 * t.quality)} of 100` : `Judge (${r.series}): no score`),
    t.scores ? el("div", {class: "pillars"}, PILLARS.map(p => [el("span", {}, p), el("b", {}, t.scores[p]), el("span", {class: "bar"}, el("i", {style: {width: `${(t.scores[p] - 1) * 25}%`}}))])) : "",
    ...(t.failure ? [el("p", {class: "wrong"}, t.failure)] : []), ...(t.reasons ? [el("div", {class: "text"}, t.reasons)] : t.scores ? [el("p", {class: "dim small"}, "The judge gave no reasons.")] : []),
  ];
}
function showTrace(i, scroll) {
  const t = T[i], r = R[t.r];
  state.at = i;
  for (const item of list.querySelectorAll(".item")) item.setAttribute("aria-current", item.dataset.i === String(i) ? "true" : "false");
  const chip = (...c) => el("span", {class: "chip"}, ...c), order = matching(), place = order.indexOf(t);
  const go = by => el("button", {type: "button", disabled: !order[place + by], on: {click: () => showTrace(order[place + by].i, true)}}, by < 0 ? "‹ previous" : "next ›");
  const block = (name, text) => ok(text) && text !== "" ? [el("h3", {}, name), el("div", {class: "text"}, String(text))] : [];
  detail.replaceChildren(
    el("div", {class: "controls"}, go(-1), go(1), el("span", {class: "dim small", style: {overflowWrap: "anywhere"}}, t.id)),
    el("p", {}, chip(dot(r.model), r.model), chip(r.benchmark), chip(verdictMark(t)), ...(RUN ? [chip(`reward ${num(t.quality, 3)}`), ok(t.advantage) && chip(`advantage ${num(t.advantage, 3)}`), chip(`confidence ${num(t.confidence, 3)}`)]
        : [chip(`confidence ${num(t.confidence, 3)}, place ${t.rank + 1} of ${r.traces}`), chip(t.kept ? `kept at K = ${num(100 * r.k, 0)} %` : "not kept")]),
      ok(t.length) && chip(`${t.length} tokens`), t.finish === "length" && chip(el("span", {class: "wrong"}, "cut off at the token limit"))),
    ...block("Problem", t.prompt), ...block("Gold answer", t.gold), ...(ok(t.answer) ? block("Answer as extracted", t.answer) : []),
    ...(RUN ? [] : judged(t, r)),
    el("h3", {}, "Trace"),
    t.tokens ? el("p", {class: "key dim"}, "probability:", ...[[1, "1"], [.5, "0.5"], [.1, "0.1"], [.01, "0.01"]].map(([p, text]) => el("span", {style: {background: `rgb(var(--heat) / ${Math.min(.85, -Math.log(p) / 6).toFixed(3)})`}}, text)), el("span", {style: {boxShadow: "inset 0 -3px 0 var(--tail)"}}, "least likely, in the confidence"))
      : el("p", {class: "dim small"}, "The trace file holds no token texts with probabilities, so there is no shading."),
    el("div", {class: "text trace"}, t.tokens ? tokenSpans(t) : textOf(t)));
  if (location.hash !== `#trace=${i}`) history.replaceState(null, "", `#trace=${i}`);
  if (scroll && innerWidth <= 860) detail.scrollIntoView({behavior: "smooth", block: "start"});
}
function browser() {
  if (!T.length) return section(title("Traces"), el("p", {class: "dim"}, "This report was made without the trace files, so it shows no texts."));
  const change = key => value => { state[key] = value; state.more = 100; fillList(); };
  const all = (names, text) => [["", text], ...names.map(n => [n, n])];
  const search = el("input", {type: "search", placeholder: "words in problem, trace or reasons", "aria-label": "search", on: {input: () => change("text")(search.value)}});
  const plain = el("input", {type: "checkbox", checked: true, on: {change: () => detail.classList.toggle("plain", !plain.checked)}});
  const left = D.traces_left;
  const whole = section(title(RUN ? "Samples" : "Traces", RUN ? `${left.shown} of ${left.judged} samples are in this page${left.shown < left.judged ? ` (cap ${left.cap}): whole groups, chosen at random` : ""}.`
    : `${left.shown} of ${left.judged} judged traces are in this page${left.shown < left.judged ? ` (cap ${left.cap}): of each result the most confident ones, and others spread over the rest` : ""}.`),
    el("div", {class: "controls"}, models.length > 1 && choice("model", all(models, "all"), change("model")).node, benchmarks.length > 1 && choice(RUN ? "step" : "benchmark", all(benchmarks, "all"), change("benchmark")).node,
      labels.length > 1 && choice("score", all(labels, "all"), change("label")).node, choice("verdict", [["", "all"], ["right", "right"], ["wrong", "wrong"], ["none", "not graded"]], change("verdict")).node,
      !RUN && choice("set", [["", "all"], ["kept", "kept"], ["rest", "not kept"]], change("set")).node, !RUN && choice("quality", [["", "all"], ["high", "0.75 and more"], ["mid", "0.5 to 0.75"], ["low", "below 0.5"], ["failed", "no score"]], change("quality")).node,
      choice("order", Object.entries(SORTS).map(([k, v]) => [k, v[0]]), change("sort"), "confidence").node, el("label", {}, plain, "shade by probability"), search, counted),
    el("div", {class: "browser"}, list, detail));
  const found = fillList(), asked = /^#trace=(\d+)$/.exec(location.hash);
  if (asked && T[+asked[1]]) showTrace(+asked[1], false); else if (found.length) showTrace(found[0].i, false);
  return whole;
}

// ---------------------------------------------------------------- the page
if (D.title) document.title = document.getElementById("title").textContent = D.title;
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
main.replaceChildren();
for (const n of D.notes) main.append(el("p", {class: "note"}, n));
function training() {
  const names = ["reward/mean", "eval/accuracy", "length/mean_tokens", "entropy/rollout_nats"].filter(n => (D.metrics || []).filter(r => ok(r[n])).length > 1);
  return names.map(name => {
    const rows = D.metrics.filter(r => ok(r[name])), values = rows.map(r => r[name]), low = Math.min(...values), high = Math.max(...values), room = (high - low) * .06 || .5;
    return section(title(name), chart((w, h) => {
      const {g, X, Y} = frame(w, h, {low: rows[0].step, high: rows.at(-1).step}, {low: low - room, high: high + room}, "step", name);
      g.append(svg("path", {d: rows.map((r, i) => `${i ? "L" : "M"}${X(r.step)},${Y(r[name])}`).join(""), fill: "none", stroke: "var(--s0)", "stroke-width": 1.8}));
      for (const r of rows) g.append(svg("circle", {cx: X(r.step), cy: Y(r[name]), r: rows.length > 60 ? 2 : 3.5, fill: "var(--s0)", tip: `step ${r.step}: ${num(r[name], 3)}`}));
      return g;
    }, 240));
  });
}
if (RUN) main.append(el("div", {class: "pair"}, training()), browser());
else {
  for (const label of labels) {
    main.append(leaderboard(label), el("div", {class: "pair"}, scatter(label), curves(label)));
    const d = dimensions(label);
    if (label === labels[0]) main.append(el("div", {class: "pair"}, [cloud(), d].filter(ok))); else if (d) main.append(d);
  }
  main.append(details(), selected(), ...[comparison(), browser()].filter(ok));
}
main.append(el("footer", {class: "dim small"}, `${RUN ? "" : "Filtered Reasoning Score: arXiv 2604.11996. "}Confidence: mean probability of a trace's least likely tokens. This page is one file and fetches nothing.`));
for (const box of document.querySelectorAll(".chart")) box.again();
