// Draws the page from the data that lies in it. No text of a run is ever read as HTML: textContent only.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  let D = JSON.parse(document.getElementById("data").textContent);
  let plots = [];
  const root = document.getElementById("page");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const many = () => D.runs.length > 1;
  // Up to eight runs have the page's own colours, more are spread over the hues.
  const runColor = (i) => (D.runs.length <= 8 ? color("--c" + i) : hueHex((360 * i) / D.runs.length));
  function hueHex(h) {
    const part = (n) => {
      const k = (n + h / 30) % 12;
      return Math.round(255 * (0.5 - 0.32 * Math.max(-1, Math.min(k - 3, 9 - k, 1)))).toString(16).padStart(2, "0");
    };
    return "#" + part(0) + part(8) + part(4);
  }

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes || {})) node.setAttribute(k, v);
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  function dot(c) { const d = el("i", { class: "dot" }); d.style.background = c; return d; }

  function number(v) {
    if (v === null || v === undefined || Number.isNaN(v)) return "–";
    const a = Math.abs(v);
    if (a === 0) return "0";
    for (const [big, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]]) if (a >= big) return +(v / big).toPrecision(4) + " " + letter;
    if (a >= 1000) return Math.round(v).toLocaleString("en");
    if (a < 1e-3) return v.toExponential(2);
    return String(+v.toPrecision(4));
  }
  function axisNumber(v) {
    if (v === null || v === undefined) return "";
    const a = Math.abs(v);
    for (const [big, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (a >= big) return +(v / big).toPrecision(4) + letter;
    return a && a < 1e-3 ? (+v.toPrecision(3)).toExponential().replace("e-", "e−") : String(+v.toPrecision(4));
  }
  function span(s) {
    if (s === null || s === undefined) return "–";
    if (s < 1) return (s * 1000).toFixed(0) + " ms";
    if (s < 120) return s.toFixed(s < 10 ? 1 : 0) + " s";
    if (s < 7200) return (s / 60).toFixed(0) + " min";
    if (s < 48 * 3600) return (s / 3600).toFixed(1) + " h";
    return (s / 86400).toFixed(1) + " days";
  }
  const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(share > 0.995 && share < 1 ? 2 : 1) + "%");
  const clock = (s) => new Date(s * 1000).toISOString().slice(0, 19).replace("T", " ");

  // ------------------------------------------------------------------------------------------------- line charts

  function marksOf(panel) {
    const found = new Map(); // by label: the same may come of events of several kinds
    for (const l of panel.lines.filter((l) => /^event\.\w+$/.test(l.source))) {
      const kind = l.source.slice(6);
      const mark = found.get(l.label) || { label: l.label, color: color("--" + (l.act || kind)) || color("--muted"), dashed: kind === "resumed", at: [] };
      mark.at.push(...D.runs.flatMap((r) => r.events.filter((e) => e.kind === kind && e.step > 0 && (!l.act || (e.data && e.data.act === l.act)))));
      found.set(l.label, mark);
    }
    return [...found.values()].filter((m) => m.at.length);
  }

  // One entry per drawn line: its own x, y, look. Tables with other x are joined by uPlot.
  function stepSeries(panel) {
    const found = [];
    D.runs.forEach((run, r) => {
      let k = 0;
      const hue = () => (many() ? runColor(r) : color("--c" + (k % 8)));
      const name = (label) => (many() ? run.name + (panel.lines.length > 1 ? " · " + label : "") : label);
      for (const line of panel.lines) {
        const [what, ...rest] = line.source.split(".");
        if (what === "step") {
          const f = rest[0], c = run.curve;
          if (!c.mean[f] || !c.mean[f].some((v) => v !== null)) continue;
          if (f === "loss" && run.undone.step.length)
            found.push({ x: run.undone.step, low: run.undone.low.loss, high: run.undone.high.loss, color: color("--undone"), label: "undone" },
              { x: run.undone.step, y: run.undone.mean.loss, label: name("undone"), color: color("--undone"), width: 1, dash: [] });
          if (c.low[f]) found.push({ x: c.step, low: c.low[f], high: c.high[f], color: hue(), label: name(line.label) });
          found.push({ x: c.step, y: c.mean[f], label: name(line.label), color: hue(), width: c.step.length > 400 ? 1.25 : 1.75, dash: many() && k ? [4, 4] : [] });
          k++;
        } else if (rest.length === 2) {
          const events = run.events.filter((e) => e.kind === rest[0] && e.data && e.data[rest[1]] !== undefined);
          if (!events.length) continue;
          const last = new Map(events.map((e) => [e.step, e.data[rest[1]]])); // a step done again: the last word
          const x = [...last.keys()].sort((a, b) => a - b);
          const at = x.map((s) => last.get(s));
          if (typeof at[0] === "object") {
            for (const source of Object.keys(at[at.length - 1])) {
              found.push({ x, y: at.map((v) => v[source] ?? null), label: many() ? run.name + " · " + source : source, color: hue(), width: 1.5, dash: [], points: x.length < 80 });
              k++;
            }
          } else {
            found.push({ x, y: at, label: name(line.label), color: hue(), width: 1.75, dash: many() ? [6, 4] : [], points: x.length < 80 });
            k++;
          }
        }
      }
    });
    return found;
  }

  function clockSeries() {
    return D.runs.flatMap((run, r) => {
      const [x, kinds] = run.power_w;
      const elapsed = x.map((t) => t - x[0]);
      return Object.keys(kinds).map((kind, k) => ({
        x: elapsed, y: kinds[kind], label: many() ? run.name + " · " + kind : kind,
        color: many() ? runColor(r) : color("--c" + (k % 8)), width: 1.5, dash: many() && k ? [4, 4] : [],
      }));
    });
  }

  function lineChart(panel, series, isClock) {
    const holder = el("div", { class: "plot" }), hint = el("div", { class: "hint" });
    const tables = [], looks = [], bands = [];
    const byX = new Map();
    const table = (x) => { if (!byX.has(x)) { byX.set(x, tables.length); tables.push({ x, ys: [], looks: [] }); } return tables[byX.get(x)]; };
    let values = [];
    for (const s of series) {
      const scaled = (ys) => ys.map((v) => (v === null ? null : v * panel.scale));
      const t = table(s.x);
      if (s.low) {
        const low = scaled(s.low), high = scaled(s.high);
        t.ys.push(high, low);
        t.looks.push({ ...s, part: "high" }, { ...s, part: "low" });
        values.push(...low, ...high);
      } else {
        const y = scaled(s.y);
        t.ys.push(y); t.looks.push(s); values.push(...y);
      }
    }
    values = values.filter((v) => v !== null && v > 0);
    let least = Infinity, most = -Infinity;
    for (const v of values) { if (v < least) least = v; if (v > most) most = v; }
    const log = panel.log && most / least > 20;
    const clean = (ys) => (log ? ys.map((v) => (v === null || v <= 0 ? null : v)) : ys);
    for (const t of tables) {
      t.looks.forEach((s, i) => {
        looks.push(s);
        if (s.part === "low") bands.push({ series: [looks.length - 1, looks.length], fill: s.color + "2e" });
      });
    }
    const data = tables.length === 1 ? [tables[0].x, ...tables[0].ys.map(clean)]
      : uPlot.join(tables.map((t) => [t.x, ...t.ys.map(clean)]), tables.map((t) => [0, ...t.ys.map(() => 2)])); // 2: no line over a null
    const marks = isClock ? [] : marksOf(panel);
    // A line that stands for several steps a point is preceded by its highest and its lowest.
    const extremes = (u, i, at) => {
      if (at === null || !looks[i - 2] || looks[i - 2].part !== "low") return "";
      return " (" + number(u.data[i - 1][at]) + " to " + number(u.data[i - 2][at]) + ")";
    };
    const axis = { stroke: color("--muted"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui", gap: 6 };
    const options = {
      width: 400, height: panel.wide ? 320 : 230, padding: [12, 14, 0, 0],
      scales: {
        x: { time: false },
        // A flat line is no noise: the axis spans at least a hundredth of what is shown.
        y: log ? { distr: 3 } : { range: (u, lo, hi) => {
          if (lo === null) return [0, 1];
          const room = Math.max((hi - lo) * 0.06, Math.abs(hi) * 5e-3, 1e-12);
          return [lo >= 0 && (lo - room < 0 || lo < 0.35 * hi) ? 0 : lo - room, hi + room];
        } },
      },
      axes: [
        { ...axis, ...(isClock ? { incrs: [1, 5, 10, 30, 60, 300, 600, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 2592000] } : {}), values: (u, vs) => vs.map(isClock ? span : axisNumber), size: 30, space: 70 },
        { ...axis, size: 58, values: (u, vs) => vs.map((v) => axisNumber(v)) },
      ],
      series: [
        { label: isClock ? "time" : "step", value: (u, v) => (v === null ? "–" : isClock ? span(v) + " after the start" : v.toLocaleString("en")) },
        ...looks.map((s) => (s.part
          ? { stroke: s.color + "70", width: 1, points: { show: false }, label: s.part, class: "extreme" }
          : { label: s.label, stroke: s.color, width: s.width, dash: s.dash, spanGaps: false, value: (u, v, i, at) => number(v) + extremes(u, i, at),
              fill: panel.key === "step_time" && !many() ? s.color + "26" : undefined,
              points: { show: !!s.points || s.x.length === 1, size: 6, fill: s.color, stroke: s.color } })),
      ],
      bands,
      cursor: { sync: isClock ? undefined : { key: "step" }, drag: { x: true, y: false }, y: false, points: { size: 7 } },
      legend: { live: true, show: series.length < 14 },
      hooks: {
        draw: [(u) => {
          const { ctx, bbox } = u, ratio = devicePixelRatio;
          ctx.save();
          ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
          for (const m of marks) {
            ctx.strokeStyle = ctx.fillStyle = m.color;
            ctx.lineWidth = ratio; ctx.setLineDash(m.dashed ? [3 * ratio, 4 * ratio] : []);
            ctx.globalAlpha = m.at.length > 100 ? 0.35 : 0.75;
            for (const e of m.at) {
              const x = Math.round(u.valToPos(e.step, "x", true)) + 0.5;
              ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
              ctx.beginPath(); ctx.moveTo(x - 4 * ratio, bbox.top); ctx.lineTo(x + 4 * ratio, bbox.top); ctx.lineTo(x, bbox.top + 6 * ratio); ctx.fill();
            }
          }
          ctx.restore();
        }],
        setCursor: [(u) => {
          const near = marks.flatMap((m) => m.at.map((e) => [Math.abs(u.valToPos(e.step, "x") - u.cursor.left), m.label, e])).filter((n) => n[0] < 7).sort((a, b) => a[0] - b[0])[0];
          hint.textContent = near ? near[1] + " at step " + near[2].step.toLocaleString("en") + ": " + near[2].detail : "";
        }],
      },
    };
    const plot = new uPlot(options, data, holder);
    plots.push(plot);
    plot.root.querySelectorAll(".u-series.extreme").forEach((row) => { row.hidden = true; });
    new ResizeObserver(() => { const w = holder.clientWidth; if (w && Math.abs(w - plot.width) > 1) plot.setSize({ width: w, height: options.height }); }).observe(holder);
    const legend = marks.length ? el("div", { class: "marks" }, marks.map((m) => el("span", {}, dot(m.color), m.at.length + " " + (m.at.length > 1 ? m.label.replace(/^\w+/, "$&s") : m.label)))) : null;
    return [holder, legend, marks.length ? hint : null];
  }

  // ------------------------------------------------------------------------------------------- bars, lives, tables

  function shares(title, parts, format) {
    const total = parts.reduce((a, p) => a + p.value, 0);
    if (!(total > 0)) return [title ? el("p", { class: "about" }, title) : null, el("p", { class: "none" }, "nothing yet")];
    const bar = el("div", { class: "shares", role: "img", "aria-label": parts.map((p) => p.label + " " + percent(p.value / total)).join(", ") });
    for (const p of parts) if (p.value > 0) {
      const piece = el("i", { title: p.label + ": " + format(p.value) + " (" + percent(p.value / total) + ")" });
      piece.style.flexGrow = p.value / total; piece.style.flexBasis = 0; piece.style.background = p.color;
      bar.append(piece);
    }
    const list = el("ul", { class: "parts" }, parts.filter((p) => p.value > 1e-4 * total).map((p) => el("li", {}, dot(p.color), p.label, el("b", {}, format(p.value)), el("em", {}, percent(p.value / total)))));
    return [title ? el("p", { class: "about" }, title) : null, bar, list];
  }

  function sharesPanel(panel) {
    return D.runs.flatMap((run, r) => {
      const title = many() ? run.name : null;
      if (panel.key === "ettr") {
        const parts = panel.lines.map((l) => { const kind = l.source.split(".")[1]; return { label: l.label, value: run.seconds[kind] || 0, color: color("--" + kind) }; });
        return [el("div", { class: "big" }, percent(run.headline.ettr), el("small", {}, "  ETTR" + (many() ? " · " + run.name : ""))), ...shares(null, parts, span)];
      }
      const kwh = run[panel.key];
      if (!kwh) return [el("p", { class: "none" }, (title ? title + ": " : "") + "nothing was measured")];
      const parts = Object.entries(kwh).map(([k, v], i) => ({ label: k, value: v, color: color("--" + k) || color("--c" + (i % 8)) }));
      return shares(title, parts, (v) => energy(v).join(" "));
    });
  }

  function lifePanel(panel) {
    return D.runs.flatMap((run, r) => {
      if (!run.attempts.length) return [el("p", { class: "none" }, run.name + " has not started")];
      const begin = Math.min(...run.attempts.map((a) => a.start_s)), end = Math.max(...run.attempts.map((a) => a.end_s));
      const whole = Math.max(end - begin, 1e-3);
      const rows = run.attempts.map((a) => {
        const svg = document.createElementNS(SVG, "svg");
        svg.setAttribute("viewBox", "0 0 1000 22"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("role", "img");
        svg.setAttribute("aria-label", "attempt " + a.number + ", " + span(a.end_s - a.start_s));
        const rect = (from, to, kind) => {
          const r = document.createElementNS(SVG, "rect");
          r.setAttribute("x", (1000 * (from - begin)) / whole); r.setAttribute("y", 0); r.setAttribute("height", 22);
          r.setAttribute("width", Math.max((1000 * (to - from)) / whole, 0.6)); r.setAttribute("class", "f-" + kind);
          const t = document.createElementNS(SVG, "title");
          t.textContent = kind + ", " + span(to - from) + " from " + clock(from) + " UTC"; r.append(t); svg.append(r);
        };
        rect(a.start_s, a.end_s, "idle");
        for (const [from, to, kind] of a.spans) rect(from, to, kind);
        const steps = a.first_step === null ? "no step" : "steps " + a.first_step.toLocaleString("en") + "–" + a.last_step.toLocaleString("en");
        return el("div", { class: "life" }, el("div", {}, "Attempt " + a.number + (a.ended === "without a word" ? ", ended without a word" : ", " + a.ended), el("small", {}, steps + (a.where ? " · " + a.where : ""))), svg);
      });
      const axis = el("div", { class: "life axis" }, el("div"), el("div", {}, [0, 0.25, 0.5, 0.75, 1].map((f) => el("span", {}, f ? "+" + span(whole * f) : clock(begin) + " UTC"))));
      const legend = el("div", { class: "marks" }, panel.lines.map((l) => el("span", {}, dot(color("--" + l.source.split(".")[1])), l.label)));
      return [r ? null : legend, many() ? el("p", { class: "about" }, run.name) : null, el("div", { class: "lives" }, rows), axis];
    });
  }

  function table(head, rows) {
    return el("div", { class: "scroll" }, el("table", { class: "t" },
      el("thead", {}, el("tr", {}, head.map((h) => el("th", { class: h[1] || "" }, h[0])))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((c, i) => el("td", { class: head[i][1] || "" }, c)))))));
  }

  function tablePanel(panel) {
    return D.runs.flatMap((run) => {
      const title = many() ? el("p", { class: "about" }, run.name) : null;
      const none = (text) => [title, el("p", { class: "none" }, text)];
      if (panel.key === "events") {
        const labels = new Map(panel.lines.map((l) => [l.source.slice(6), l.label]));
        const rows = run.events.filter((e) => labels.has(e.kind)).slice(-200).reverse();
        if (!rows.length) return none("none");
        return [title, table([["time (UTC)", "kind"], ["event", "kind"], ["step", "n"], ["what happened"]], rows.map((e) => [clock(e.time_s), labels.get(e.kind), e.step.toLocaleString("en"), e.detail]))];
      }
      if (panel.key === "logs") {
        if (!run.log_errors.length) return none("none in the last lines of the logs");
        return [title, table([["where", "code kind"], ["line", "code"]], run.log_errors.map((e) => [e.file + ":" + e.line, e.text]))];
      }
      if (panel.key === "carbon") {
        if (!run.carbon) return none("nothing was measured");
        return [title, table([["figure"], ["value", "n"], ["low", "n"], ["high", "n"], ["how it was got"]], run.carbon.rows), el("ul", { class: "about" }, run.carbon.remarks.map((r) => el("li", {}, r)))];
      }
      if (panel.key === "mix") {
        return [title, table([["source"], ["share of rows", "n"], ["tokens there", "n"], ["epochs", "n"]], run.mix.map((m) => [m.source + (m.stands_in_for ? " (stands in for " + m.stands_in_for + ")" : ""), percent(m.proportion), number(m.tokens), number(m.epochs)]))];
      }
      if (panel.key === "forecast") {
        if (!run.forecast) return none("this run has no forecast (no plan.json in its directory)");
        if (!run.forecast.length) return none("the forecast names nothing that a run measures");
        return [title, table([["figure"], ["forecast", "n"], ["measured", "n"], ["off by", "n"]], run.forecast.map((f) => [f.figure, number(f.forecast) + (f.low !== null ? " (" + number(f.low) + " to " + number(f.high) + ")" : ""), number(f.measured), f.measured === null ? "–" : (100 * (f.forecast / f.measured - 1)).toFixed(1) + "%"]))];
      }
      return none("");
    });
  }

  // ------------------------------------------------------------------------------------------------------- the page

  function tile(label, value, small, share) {
    const bar = share === undefined ? null : el("div", { class: "bar" }, el("i"));
    if (bar) bar.firstChild.style.width = 100 * Math.min(1, share) + "%";
    return el("div", { class: "tile" }, el("span", {}, label), el("b", {}, value, small ? el("small", {}, " " + small) : null), bar);
  }
  const energy = (kwh) => (kwh === null ? ["–", "not measured"] : kwh < 0.1 ? [number(1000 * kwh), "Wh"] : kwh < 10000 ? [number(kwh), "kWh"] : [number(kwh / 1000), "MWh"]);
  const mass = (kg) => (kg < 0.1 ? [number(1000 * kg), "g CO2e"] : kg < 10000 ? [number(kg), "kg CO2e"] : [number(kg / 1000), "t CO2e"]);
  const chip = (state) => el("span", { class: "chip " + (state === "no sign of life" ? "silent" : state) }, state);

  function top() {
    if (many()) {
      const head = [["run", "name"], ["state"], ["steps done", "n"], ["loss", "n"], ["held-out", "n"], ["tokens/s", "n"], ["MFU", "n"], ["ETTR", "n"], ["kWh", "n"], ["kg CO2e", "n"], ...D.differing.map((k) => [k])];
      const rows = D.runs.map((r, i) => [el("span", {}, dot(runColor(i)), r.name), r.state, r.steps_done.toLocaleString("en"), number(r.headline.loss), number(r.headline.held_out_loss), number(r.headline.tokens_per_s), percent(r.headline.mfu), percent(r.headline.ettr), number(r.energy_kwh), number(r.co2e_kg), ...D.differing.map((k) => String(r.config[k] ?? "–"))]);
      return [el("div", { class: "card wide" }, table(head, rows))];
    }
    const r = D.runs[0], h = r.headline;
    return [el("div", { class: "tiles" },
      tile("step" + (h.left_s ? ", " + span(h.left_s) + " left" : ""), r.steps_done.toLocaleString("en"), "of " + r.steps_planned.toLocaleString("en"), r.steps_done / r.steps_planned),
      tile("loss", number(h.loss), "nats/token"), tile("held-out loss", number(h.held_out_loss), "nats/token"),
      tile("tokens", number(h.tokens)), tile("speed", number(h.tokens_per_s), "tokens/s"), tile("MFU", percent(h.mfu)),
      tile("ETTR", percent(h.ettr)), tile("energy at the site" + (r.energy_covered_share < 1 && r.energy_kwh !== null ? ", of " + percent(r.energy_covered_share) + " of the device-hours" : ""), ...energy(r.energy_kwh)),
      r.co2e_kg === null ? tile("carbon", "–", "set carbon.zone") : tile("carbon", ...mass(r.co2e_kg)))];
  }

  const isWide = (panel) => panel.kind === "life" || panel.kind === "table" || ["loss", "ettr", "power"].includes(panel.key);

  // Rows without holes: neighbours that are not wide share a row, two or three of them.
  function cards(panels) {
    const found = [];
    let row = [];
    const close = () => {
      row.forEach((c) => c.classList.add(row.length === 1 ? "wide" : row.length === 3 ? "third" : "half"));
      found.push(...row);
      row = [];
    };
    for (const panel of panels) {
      const c = card(panel);
      if (isWide(panel)) { close(); c.classList.add("wide"); found.push(c); continue; }
      row.push(c);
      if (row.length === 3) close();
    }
    close();
    return found;
  }

  function card(panel) {
    panel.wide = panel.key === "loss";
    let body;
    if (panel.kind === "steps" || panel.kind === "clock") {
      const series = panel.kind === "clock" ? clockSeries() : stepSeries(panel);
      body = series.length ? lineChart(panel, series, panel.kind === "clock") : [el("p", { class: "none" }, "nothing was recorded")];
      const notes = panel.kind === "clock" ? D.runs.map((r) => r.power_note).filter((n) => n) : [];
      if (notes.length && series.length) body.push(el("p", { class: "about" }, notes.join("; ")));
    } else body = { shares: sharesPanel, life: lifePanel, table: tablePanel }[panel.kind](panel);
    return el("article", { class: "card", id: "panel-" + panel.key },
      el("h3", {}, panel.title, panel.unit ? el("small", {}, panel.unit) : null),
      panel.about ? el("p", { class: "about" }, panel.about) : null, body);
  }

  function configuration() {
    return D.runs.map((r) => el("article", { class: "card wide" }, el("details", {}, el("summary", {}, "Configuration" + (many() ? " of " + r.name : "")),
      table([["key", "code"], ["value", "code"]], [["code", r.code], ...Object.entries(r.config).map(([k, v]) => [k, v === null ? "null" : String(v)])]))));
  }

  function render() {
    for (const p of plots) p.destroy();
    plots = [];
    const at = scrollY;
    const one = D.runs[0];
    const about = many() ? D.runs.length + " runs" : one.summary;
    root.replaceChildren(
      el("header", {}, el("div", { class: "in" }, el("div", { class: "row" }, el("h1", {}, many() ? D.title : one.name), many() ? null : chip(one.state)),
        el("p", { class: "sub" }, about + " · as of " + clock(Math.max(...D.runs.map((r) => r.updated_s))) + " UTC"))),
      el("nav", { "aria-label": "sections" }, el("div", { class: "in" }, D.sections.map((s) => el("a", { href: "#" + s.toLowerCase() }, s)), el("a", { href: "#configuration" }, "Configuration"))),
      el("main", {}, top(), D.sections.map((s) => el("section", { id: s.toLowerCase() }, el("h2", {}, s), el("div", { class: "grid" }, cards(D.panels.filter((p) => p.section === s))))),
        el("section", { id: "configuration" }, el("h2", {}, "Configuration"), el("div", { class: "grid" }, configuration())),
        el("footer", {}, "Made by arriero from the run directory. Drag across a chart to zoom, double-click to see all." + (D.live_s ? " Refreshes itself." : ""))));
    for (const p of plots) { const w = p.root.parentNode.clientWidth; if (w) p.setSize({ width: w, height: p.height }); }
    scrollTo(0, at);
    root.dataset.drawn = String(plots.length);
  }

  render();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

  if (D.live_s) {
    let seen = null;
    const look = async () => {
      try {
        const answer = await fetch("data.json", { cache: "no-cache" });
        const tag = answer.headers.get("ETag");
        if (answer.ok && tag !== seen) { if (seen !== null) { D = await answer.json(); render(); } seen = tag; }
      } catch (error) { /* the server is away: the next look tells */ }
      setTimeout(look, 1000 * D.live_s);
    };
    look();
  }
})();
