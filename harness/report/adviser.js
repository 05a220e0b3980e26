"use strict";
(() => {
  const data = JSON.parse(document.getElementById("adviser-data").textContent);
  const points = data.points.map((values) => Object.fromEntries(data.fields.map((field, i) => [field, values[i]])));
  const form = document.getElementById("adviser");
  if (!points.length) return;
  form.hidden = false;
  const field = (name) => form.elements[name];
  const BYTES = "none: bytes only";
  const DEFAULT = { loss: 2, perplexity: 1.1, kl: 0.1 };
  const DENSE = { loss: 0, perplexity: 1, kl: 0 };
  const WORD = { loss: "points of accuracy lost", perplexity: "times the dense perplexity", kl: "nats to dense" };
  const distinct = (values) => [...new Set(values)].sort((a, b) => (typeof a === "number" ? a - b : `${a}`.localeCompare(`${b}`)));

  const fill = (select, values) => {
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.map(String).includes(before)) select.value = before;
    select.disabled = values.length < 2;
  };
  const name = (p) => [p.method, p.variant, p.sparsity_requested === null ? "" : `at ${p.sparsity_requested}`,
    p.scope === "native" ? "" : "of all blocks", p.phase === "decode" ? "(decode only)" : ""].filter(Boolean).join(" ");
  const text = (value, digits = 3) => (value === null ? "–" : Number(value.toPrecision(digits)).toString());

  // What the controls leave, each with its gain (speed-up, or share of bytes) and its cost.
  const view = () => {
    const mine = points.filter((p) => p.model === field("model").value && !p.oracle);
    const timed = field("device").value !== BYTES;
    const quality = field("quality").value;
    const fits = (t) => t.device === field("device").value && t.dtype === field("dtype").value &&
      `${t.batch}` === field("batch").value;
    const seen = [], untimed = [], unscored = [];
    for (const p of mine) {
      const time = p.times.filter(fits).map((t) => t.speedup);
      const gain = timed ? (time.length ? Math.max(...time) : null) : p.skipped;
      if (p[quality] === null) unscored.push(name(p));
      else if (gain === null) untimed.push(name(p));
      else seen.push({ ...p, gain, cost: p[quality], error: p[`${quality}_error`] ?? 0 });
    }
    return { seen, untimed, unscored, timed, quality };
  };

  // On the front: nothing else gains at least as much at less cost. It may be there where the costs can't be told apart.
  const judge = (seen) => {
    for (const p of seen) p.front = !seen.some((o) => o !== p && o.gain >= p.gain && o.cost <= p.cost && (o.gain > p.gain || o.cost < p.cost));
    for (const p of seen) {
      const better = seen.filter((o) => o.front && o.gain >= p.gain && o.cost <= p.cost);
      p.tied = !p.front && better.some((o) => p.cost - o.cost <= 1.96 * Math.hypot(p.error, o.error));
    }
  };

  const options = () => {
    const mine = points.filter((p) => p.model === field("model").value);
    const times = mine.flatMap((p) => p.times);
    fill(field("device"), [BYTES, ...distinct(times.map((t) => t.device))]);
    const here = times.filter((t) => t.device === field("device").value);
    fill(field("dtype"), here.length ? distinct(here.map((t) => t.dtype)) : ["any"]);
    const those = here.filter((t) => t.dtype === field("dtype").value);
    fill(field("batch"), those.length ? distinct(those.map((t) => t.batch)) : ["any"]);
  };

  const element = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const ticks = (low, high) => {
    const rough = (high - low || 1) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + 1e-9; at += step) found.push(Math.abs(at) < 1e-12 ? 0 : at);
    return found;
  };

  const plot = ({ seen, timed, quality }, budget) => {
    const box = document.getElementById("adviser-plot");
    box.replaceChildren();
    if (!seen.length) return;
    const wide = Math.min(900, Math.max(340, box.clientWidth || 720));
    const [high, left, bottom, top] = [wide < 500 ? 260 : 320, 46, 42, 26];
    const dense = DENSE[quality];
    const most = Math.max(budget * 2.2, dense + (budget - dense) * 3);
    const shown = seen.filter((p) => p.cost <= most);
    const gains = shown.map((p) => p.gain);
    const [g0, g1] = [Math.min(timed ? 1 : 0, ...gains), Math.max(timed ? 1.05 : 0.1, ...gains) * 1.04];
    const low = Math.min(dense, ...shown.map((p) => p.cost));
    const x = (gain) => left + ((gain - g0) / (g1 - g0 || 1)) * (wide - left - 14);
    const y = (cost) => top + (1 - (cost - low) / (most - low || 1)) * (high - bottom - top);
    const svg = element("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-labelledby": "adviser-title" });
    svg.append(element("title", { id: "adviser-title" },
      `${seen.length} schemes: quality lost by ${timed ? "speed-up" : "share of block weights skipped"}; the table below says the same`));
    svg.append(element("rect", { x: left, y: y(budget), width: wide - left - 14, height: Math.max(0, y(low) - y(budget)), class: "within" }));
    for (const gain of ticks(g0, g1)) {
      svg.append(element("text", { x: x(gain), y: high - 22, "text-anchor": "middle" }, timed ? `${text(gain)}x` : `${Math.round(100 * gain)}%`));
    }
    for (const cost of ticks(low, most)) {
      svg.append(element("text", { x: left - 8, y: y(cost) + 4, "text-anchor": "end" }, text(cost, 3)));
    }
    svg.append(element("text", { x: 4, y: 13 }, WORD[quality]));
    svg.append(element("line", { x1: left, x2: wide - 14, y1: y(dense), y2: y(dense), class: "guide" }));
    svg.append(element("text", { x: (left + wide) / 2, y: high - 4, "text-anchor": "middle" },
      timed ? "speed-up over the strongest dense step" : "block weights skipped"));
    const placed = [];
    const label = (p) => {  // the names of the front, where they do not run into one another
      const [at, size] = [{ x: x(p.gain) + 9, y: y(p.cost) + 15 }, name(p).length * 6.4];
      if (at.x + size > wide || placed.some((o) => Math.abs(o.y - at.y) < 15 && o.x < at.x + size && at.x < o.x + o.size)) return;
      placed.push({ ...at, size });
      svg.append(element("text", { ...at, class: "name" }, name(p)));
    };
    const front = shown.filter((p) => p.front).sort((a, b) => a.gain - b.gain);
    svg.append(element("polyline", { points: front.map((p) => `${x(p.gain)},${y(p.cost)}`).join(" "), class: "front" }));
    for (const p of shown) {
      svg.append(element("circle", { cx: x(p.gain), cy: y(p.cost), r: p.front ? 5.5 : 4, class: p.front ? "best" : p.tied ? "tied" : "other" },
        element("title", {}, `${name(p)}: ${text(p.cost)}`)));
    }
    front.forEach(label);
    box.append(svg);
    if (shown.length < seen.length) {
      const note = document.createElement("p");
      note.className = "soft";
      note.textContent = `${seen.length - shown.length} schemes lose more than the picture shows; they are in the table.`;
      box.append(note);
    }
  };

  const list = ({ seen, timed, quality }, budget, least) => {
    const table = document.getElementById("adviser-table");
    const heads = ["scheme", timed ? "speed-up" : "weights skipped", WORD[quality], "± standard error", "MLPs skipped", "where it lies"];
    const row = (cells, tag) => {
      const tr = document.createElement("tr");
      cells.forEach((cell, i) => {
        const td = document.createElement(tag);
        if (tag === "th") td.scope = "col";
        if (i > 0 && i < 5) td.className = "n";
        td.textContent = cell;
        tr.append(td);
      });
      return tr;
    };
    table.tHead.replaceChildren(row(heads, "th"));
    const place = (p) => (p.cost > budget ? "over the budget" : p.gain < least ? "gains too little" : p.front ? "on the front"
      : p.tied ? "may be on the front" : "beaten");
    const rank = (p) => ["on the front", "may be on the front", "beaten", "gains too little", "over the budget"].indexOf(place(p));
    const sorted = [...seen].sort((a, b) => rank(a) - rank(b) || b.gain - a.gain);
    table.tBodies[0].replaceChildren(...sorted.map((p) => {
      const tr = row([name(p), timed ? `${text(p.gain)}x` : `${(100 * p.gain).toFixed(1)}%`, text(p.cost), text(p.error, 2),
        p.mlp === null ? "–" : `${(100 * p.mlp).toFixed(1)}%`, place(p)], "td");
      if (rank(p) > 1) tr.className = "soft";
      return tr;
    }));
  };

  const answer = ({ seen, timed, quality }, budget, least) => {
    const fitting = seen.filter((p) => p.cost <= budget && p.gain >= least).sort((a, b) => b.gain - a.gain || a.cost - b.cost);
    const out = document.getElementById("adviser-answer");
    if (!fitting.length) {
      out.textContent = seen.length ? "No scheme here meets both budgets: stay dense, or allow more." : "Nothing was measured for this choice.";
      return;
    }
    const best = fitting[0];
    const near = fitting.filter((p) => p !== best && p.gain >= best.gain * 0.97).map(name);
    const gain = timed ? `${text(best.gain)}x the speed of the strongest dense step` : `${(100 * best.gain).toFixed(0)}% of the block weights skipped`;
    out.textContent = `Use ${name(best)}: ${gain}, ${text(best.cost)} ${WORD[quality]} (± ${text(best.error, 2)}).` +
      (near.length ? ` Within 3% of that gain: ${near.join("; ")}.` : "") +
      (timed && best.gain <= 1 ? " That is no gain: the dense step is as fast." : "") +
      (timed ? "" : " Bytes are not time: choose hardware to see what was timed.");
  };

  const update = () => {
    options();
    const found = view();
    judge(found.seen);
    const number = (input, otherwise) => (input.value === "" || Number.isNaN(input.valueAsNumber) ? otherwise : input.valueAsNumber);
    const budget = number(field("budget"), DEFAULT[found.quality]);
    const least = number(field("gain"), 0) / (found.timed ? 1 : 100);
    document.getElementById("adviser-gain").textContent = found.timed ? "Speed-up at least" : "Bytes saved at least, %";
    answer(found, budget, least);
    plot(found, budget);
    list(found, budget, least);
    const missing = [];
    if (found.untimed.length) missing.push(`Not timed through a kernel on this hardware: ${found.untimed.join(", ")}.`);
    if (found.unscored.length) missing.push(`Without rows of this quality: ${found.unscored.join(", ")}.`);
    document.getElementById("adviser-missing").textContent = missing.join(" ");
  };

  const models = distinct(points.map((p) => p.model));
  const known = (model) => points.filter((p) => p.model === model).length;
  fill(field("model"), models);
  field("model").value = models.reduce((most, model) => (known(model) > known(most) ? model : most));
  field("budget").value = DEFAULT.loss;
  field("quality").addEventListener("change", () => { field("budget").value = DEFAULT[field("quality").value]; });
  form.addEventListener("input", update);
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", update);
  update();
})();
