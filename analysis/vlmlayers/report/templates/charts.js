"use strict";
// Charts of a report: plain SVG drawn from the JSON in the page. Nothing is fetched.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  const TOWER = { vision: "#0072B2", text: "#B34700" };
  const COLOURS = ["#0072B2", "#B34700", "#007E5D", "#B5568F", "#8A6D00", "#2F8FC4", "#4D4D4D",
    "#7A3E9D", "#9C2F2F", "#5B7F00"];
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
    [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  const POOLED = "all datasets, pooled", MEAN = "mean over datasets";

  // In the middle: names of datasets and models often share their beginning.
  const cut = (name, room) => name.length > room ? `${name.slice(0, Math.ceil(room / 2))}…${name.slice(1 - Math.floor(room / 2))}` : name;

  const node = (name, attributes = {}, text) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const html = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const show = (value) => value === null || value === undefined || !Number.isFinite(value) ? "–"
    : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  const isBlock = (position) => /^[0-9]+$/.test(position);
  const title = (word) => word.charAt(0).toUpperCase() + word.slice(1);
  const datasetLabel = (name) => name === "*" ? POOLED : name === "" ? MEAN : name;
  const unique = (list) => [...new Set(list)];
  const mean = (list) => {
    const known = list.filter((v) => v !== null && v !== undefined);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };
  const colour = (share) => {
    const at = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1);
    const low = Math.floor(at), high = Math.min(low + 1, CIVIDIS.length - 1);
    const mix = CIVIDIS[low].map((c, i) => Math.round(c + (CIVIDIS[high][i] - c) * (at - low)));
    return `rgb(${mix.join(",")})`;
  };
  const ticks = (low, high, count = 5) => {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power;
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) {
      found.push(+v.toPrecision(12));
    }
    return found;
  };

  // One axis for both towers: block numbers where depths agree, else relative depth.
  const depthAxis = (towers, tail, depth = DATA.depth) => {
    const depths = towers.map((t) => depth[t]);
    const longest = Math.max(...depths), equal = new Set(depths).size === 1;
    const step = Math.max(1, longest / 12);
    const ends = ["final", "proj"].filter((p) => tail.has(p));
    const x = (tower, position) => isBlock(position) ? Number(position) * longest / depth[tower]
      : position === "embed" ? 0 : longest + (ends.indexOf(position) + 1) * step;
    const every = Math.ceil(longest / 12);
    const marks = [{ x: 0, label: "Embed", must: true }];
    if (equal) for (let b = every; b <= longest; b += every) marks.push({ x: b, label: String(b) });
    else for (const share of [0.25, 0.5, 0.75, 1]) marks.push({ x: share * longest, label: String(share) });
    for (const end of ends) marks.push({ x: x("", end), label: title(end), must: end === ends[ends.length - 1] });
    return { x, marks, low: -0.4 * step, high: longest + ends.length * step + 0.4 * step,
      label: equal ? "Block" : "Relative depth", half: (tower) => longest / depth[tower] / 2 };
  };

  const frame = (plot, height, margins) => {
    const width = Math.max(280, Math.round(plot.clientWidth || 640));
    plot.querySelectorAll("svg, .tip").forEach((old) => old.remove());
    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": FONT,
      "font-size": 12, role: "img", "aria-label": plot.dataset.alt || "Chart", xmlns: NS });
    plot.prepend(svg);
    const tip = html("div", { className: "tip", hidden: true });
    plot.append(tip);
    return { svg, tip, width, height, left: margins.left, right: width - margins.right,
      top: margins.top, bottom: height - margins.bottom };
  };
  const live = (plot) => plot.querySelector(".live") ||
    plot.appendChild(html("div", { className: "live", ariaLive: "polite", role: "status" }));
  const placeTip = (plot, area, x, y, heading, lines) => {
    area.tip.replaceChildren(html("b", { textContent: heading }),
      ...lines.map((line) => html("span", { textContent: line })));
    area.tip.hidden = false;
    const scale = plot.clientWidth / area.width, wide = area.tip.offsetWidth;
    const left = Math.min(Math.max(0, x * scale + 12), Math.max(0, plot.clientWidth - wide));
    area.tip.style.left = `${x * scale + 12 + wide > plot.clientWidth ? Math.max(0, x * scale - wide - 12) : left}px`;
    area.tip.style.top = `${Math.max(0, y * scale)}px`;
  };
  const pointer = (plot, area, event) => {
    const box = area.svg.getBoundingClientRect();
    return [(event.clientX - box.left) * area.width / box.width,
      (event.clientY - box.top) * area.height / box.height];
  };
  // Pointer and arrow keys move over the same stops; what is under them is also read aloud.
  const explore = (plot, area, stops, locate, tell) => {
    let current = -1;
    const go = (index, aloud) => {
      current = Math.min(stops - 1, Math.max(0, index));
      const said = tell(current);
      if (aloud) live(plot).textContent = said;
    };
    const leave = () => { area.tip.hidden = true; tell(-1); };
    plot.onpointermove = (event) => { const at = locate(...pointer(plot, area, event)); if (at >= 0) go(at, false); else leave(); };
    plot.onpointerdown = plot.onpointermove;
    plot.onpointerleave = leave;
    plot.onblur = leave;
    plot.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: plot.rowLength || 1, ArrowUp: -(plot.rowLength || 1) }[event.key];
      if (step && stops) { event.preventDefault(); go(current < 0 ? 0 : current + step, true); }
      if (event.key === "Escape") leave();
    };
  };

  const lineChart = (plot, spec) => {
    plot.dataset.alt = spec.alt;
    const narrow = plot.clientWidth < 520;
    const legendRows = Math.ceil(spec.series.length / (narrow ? 2 : 4));
    const area = frame(plot, (narrow ? 300 : 360) + legendRows * 18,
      { left: spec.left || 52, right: 14, top: 12 + legendRows * 18, bottom: spec.slanted ? 92 : 58 });
    const { svg, left, right, top, bottom } = area;
    const lanes = unique((spec.shade || []).filter((b) => b.lane !== undefined).map((b) => b.lane)).length;
    const spread = spec.bands !== false || spec.whiskers;
    const all = spec.series.flatMap((s) => s.points.flatMap((p) => spread ? [p.value, p.low, p.high] : [p.value]))
      .concat((spec.chance || []).flatMap((l) => l.points.flatMap((p) => [p.low, p.high])), (spec.levels || []).map((l) => l.value)).filter((v) => v !== null && v !== undefined);
    let low = Math.min(...all), high = Math.max(...all);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    low -= low >= 0 && low < room ? low : room;
    high += room;
    const X = (v) => left + (v - spec.axis.low) / (spec.axis.high - spec.axis.low) * (right - left);
    const Y = (v) => bottom - (v - low) / (high - low) * (bottom - top);
    for (const band of spec.shade || []) {
      const [from, to] = [Math.max(left, X(band.from)), Math.min(right, X(band.to))];
      const place = band.lane === undefined ? { y: top, height: bottom - top, opacity: 0.09 }
        : { y: bottom + 5 + 6 * band.lane, height: 5, opacity: band.pale ? 0.3 : 1, class: "chosen" };
      svg.append(node("rect", { x: from, width: Math.max(0, to - from), fill: band.colour, ...place }));
    }
    for (const v of ticks(low, high)) {
      svg.append(node("line", { x1: left, x2: right, y1: Y(v), y2: Y(v), stroke: "#E3E3E8" }),
        node("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end", fill: "#55555E" }, show(v)));
    }
    let lastLabel = -99;
    for (const mark of spec.axis.marks) {
      svg.append(node("line", { x1: X(mark.x), x2: X(mark.x), y1: bottom, y2: bottom + 4, stroke: "#8B8B95" }));
      const need = spec.slanted ? 13 : 6 + mark.label.length * 6.6;
      const crowded = spec.axis.marks.some((m) => m.must && m !== mark && Math.abs(X(m.x) - X(mark.x)) < 4 + (m.label.length + mark.label.length) * 3.4);
      if ((X(mark.x) - lastLabel < need || crowded) && !mark.must) continue;
      lastLabel = X(mark.x);
      const label = node("text", { x: X(mark.x), y: bottom + 18 + 6 * lanes, "text-anchor": spec.slanted ? "end" : "middle", fill: "#55555E" }, mark.label);
      if (spec.slanted) label.setAttribute("transform", `rotate(-45 ${X(mark.x)} ${bottom + 12})`);
      svg.append(label);
    }
    svg.append(node("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "#8B8B95" }),
      node("text", { x: (left + right) / 2, y: area.height - 6, "text-anchor": "middle", fill: "#1B1B1F" }, spec.axis.label),
      node("text", { x: 13, y: (top + bottom) / 2, "text-anchor": "middle", fill: "#1B1B1F",
        transform: `rotate(-90 13 ${(top + bottom) / 2})` }, spec.yLabel));
    const names = []; // of lines, above all curves
    for (const line of spec.chance || []) {
      const points = line.flat ? [{ ...line.points[0], at: left }, { ...line.points[0], at: right }] : line.points.map((p) => ({ ...p, at: X(p.x) }));
      const path = (pick, list = points) => list.map((p) => `${p.at.toFixed(1)} ${Y(pick(p)).toFixed(1)}`).join("L");
      svg.append(node("path", { d: `M${path((p) => p.high)}L${path((p) => p.low, [...points].reverse())}Z`, fill: line.colour, opacity: 0.12 }),
        node("path", { d: `M${path((p) => p.value)}`, fill: "none", stroke: line.colour, "stroke-dasharray": "5 3", class: "chance" }));
      names.push(node("text", { x: right, y: Y(points.at(-1).value) - 5, "text-anchor": "end", fill: line.flat ? "#55555E" : line.colour, class: "over" }, line.label));
    }
    for (const level of spec.levels || []) {
      svg.append(node("line", { x1: left, x2: right, y1: Y(level.value), y2: Y(level.value), stroke: level.colour, "stroke-dasharray": "5 3", class: "level" }));
      if (level.label) names.push(node("text", { x: right, y: Y(level.value) - 5, "text-anchor": "end", fill: level.colour, class: "over" }, level.label));
    }
    spec.series.forEach((s, i) => {
      const path = (pick) => s.points.map((p, k) => `${k && !p.apart ? "L" : "M"}${X(p.x).toFixed(1)} ${Y(pick(p)).toFixed(1)}`).join("");
      const banded = s.points.filter((p) => p.low !== null && p.low !== undefined && p.high !== null);
      if (spec.whiskers) for (const p of banded) {
        svg.append(node("line", { x1: X(p.x), x2: X(p.x), y1: Y(p.low), y2: Y(p.high), stroke: s.colour, "stroke-width": 1.4, opacity: 0.75, class: "whisker" }));
      } else if (spec.bands !== false && banded.length > 1) {
        const back = [...banded].reverse().map((p) => `L${X(p.x).toFixed(1)} ${Y(p.low).toFixed(1)}`).join("");
        const there = banded.map((p, k) => `${k ? "L" : "M"}${X(p.x).toFixed(1)} ${Y(p.high).toFixed(1)}`).join("");
        svg.append(node("path", { d: `${there}${back}Z`, fill: s.colour, opacity: 0.15, class: "band" }));
      }
      svg.append(node("path", { d: path((p) => p.value), fill: "none", stroke: s.colour, "stroke-width": 2,
        "stroke-dasharray": s.dash || "none", "stroke-linejoin": "round", class: "series" }));
      if (!s.bare) for (const p of s.points) {
        svg.append(i % 2 ? node("rect", { x: X(p.x) - 3, y: Y(p.value) - 3, width: 6, height: 6, fill: s.colour })
          : node("circle", { cx: X(p.x), cy: Y(p.value), r: 3.2, fill: s.colour }));
      }
      const columns = narrow ? 2 : 4, cell = (right - left) / columns;
      const [lx, ly] = [left + (i % columns) * cell, 12 + Math.floor(i / columns) * 18];
      const room = Math.floor((cell - 34) / 7.2);
      svg.append(node("line", { x1: lx, x2: lx + 22, y1: ly, y2: ly, stroke: s.colour, "stroke-width": 2, "stroke-dasharray": s.dash || "none" }),
        node("text", { x: lx + 28, y: ly + 4, fill: "#1B1B1F" }, cut(s.name, room)));
    });
    svg.append(...names);
    if (DATA.random) svg.append(node("text", { x: right, y: top + 12, "text-anchor": "end", fill: "#8A1F1F", "font-weight": 600 }, "random weights"));
    const apart = spec.whiskers ? 0.3 : 1e-6;
    const stops = unique(spec.series.flatMap((s) => s.points.map((p) => p.x))).sort((a, b) => a - b)
      .filter((x, i, all) => !i || x - all[i - 1] > apart);
    const rule = svg.appendChild(node("line", { y1: top, y2: bottom, stroke: "#55555E", "stroke-dasharray": "2 2", visibility: "hidden" }));
    explore(plot, area, stops.length, (x, y) => {
      if (!stops.length || y < top - 8 || y > bottom + 8) return -1;
      return stops.reduce((best, s, i) => Math.abs(X(s) - x) < Math.abs(X(stops[best]) - x) ? i : best, 0);
    }, (index) => {
      rule.setAttribute("visibility", index < 0 ? "hidden" : "visible");
      if (index < 0) return "";
      const at = X(stops[index]);
      rule.setAttribute("x1", at); rule.setAttribute("x2", at);
      const here = spec.series.map((s) => [s, s.points.find((p) => Math.abs(p.x - stops[index]) <= apart * 1.2)]).filter(([, p]) => p);
      const heading = unique(here.map(([, p]) => p.label)).join(" / ");
      const lines = here.map(([s, p]) => `${s.name} ${show(p.value)}` +
        (p.low !== null && p.low !== undefined ? ` [${show(p.low)}, ${show(p.high)}]` : "") + (p.more ? ` ${p.more}` : ""));
      placeTip(plot, area, at, top + 6, heading, lines);
      return `${heading}: ${lines.join(", ")}`;
    });
  };

  // What chance gives: one line, or one per tower where they differ; flat where it is the same at
  // every position. Where curves of one tower have their own, as those of datasets may, a band.
  const chanceLines = (groups) => {
    const lines = groups.map(({ tower, points }) => {
      const known = points.filter((p) => p.null !== null), xs = unique(known.map((p) => p.x)).sort((a, b) => a - b);
      const at = xs.map((x) => known.filter((p) => p.x === x).map((p) => p.null));
      return { label: `Chance, ${tower}`, colour: TOWER[tower],
        points: xs.map((x, i) => ({ x, value: mean(at[i]), low: Math.min(...at[i]), high: Math.max(...at[i]) })) };
    }).filter((line) => line.points.length);
    if (!lines.length) return [];
    const all = groups.flatMap((g) => g.points.flatMap((p) => [p.value, p.null])).filter((v) => v !== null && v !== undefined);
    const same = (values) => Math.max(...values) - Math.min(...values) <= 0.01 * (Math.max(...all) - Math.min(...all));
    const longest = lines.reduce((a, b) => b.points.length > a.points.length ? b : a);
    const alike = longest.points.every((p) => same(lines.flatMap((l) => l.points.filter((q) => q.x === p.x).map((q) => q.value))));
    return (alike ? [{ ...longest, label: "Chance", colour: "#6B6B6B" }] : lines).map((line) => !same(line.points.map((p) => p.value)) ? line
      : { ...line, flat: true, points: [{ value: mean(line.points.map((p) => p.value)), low: Math.min(...line.points.map((p) => p.low)), high: Math.max(...line.points.map((p) => p.high)) }] });
  };

  const heatmap = (plot, spec) => {
    plot.dataset.alt = spec.alt;
    const names = spec.rows.map(String);
    const width = Math.max(280, plot.clientWidth || 640);
    const longest = Math.min(Math.max(...names.map((n) => n.length)) * 6.8, width * 0.34);
    const left = Math.max(58, longest + 30);
    const most = document.documentElement.classList.contains("printing") ? 30 : 46;
    const cell = Math.min(most, (width - left - 14) / spec.columns.length);
    const tall = spec.square ? Math.min(cell, Math.max(14, 600 / names.length)) : 28;
    const area = frame(plot, Math.round(tall * names.length + 120), { left, right: 14, top: 46, bottom: 74 });
    const { svg, top } = area;
    const known = spec.values.flat().filter((v) => v !== null);
    const low = Math.min(...known), high = Math.max(...known);
    const bottom = top + tall * names.length;
    const fit = Math.floor(longest / 6.4);
    const every = Math.max(1, Math.ceil(14 / cell));
    names.forEach((name, r) => {
      if (!spec.square || r % Math.ceil(13 / tall) === 0) svg.append(node("text", { x: left - 8, y: top + (r + 0.5) * tall + 4, "text-anchor": "end", fill: "#55555E" },
        name.length > fit && fit > 3 ? cut(name, fit) : spec.square ? title(name) : name));
      spec.columns.forEach((column, c) => {
        const value = spec.values[r][c];
        svg.append(node("rect", { x: left + c * cell, y: top + r * tall, width: cell + 0.3, height: tall + 0.3,
          fill: value === null ? "#EFEFF2" : colour((value - low) / (high - low || 1)), class: "cell" }));
      });
    });
    spec.columns.forEach((column, c) => {
      if (c % every && isBlock(column)) return;
      const x = left + (c + 0.5) * cell;
      const wide = !isBlock(column);
      const label = node("text", { x, y: bottom + 16, "text-anchor": wide ? "end" : "middle", fill: "#55555E" }, title(column));
      if (wide) label.setAttribute("transform", `rotate(-60 ${x} ${bottom + 12})`);
      svg.append(label);
    });
    const mark = (tower, names, vertical) => (DATA.standing?.[tower] || []).forEach((how, b) => {
      const at = names.indexOf(String(b + 1));
      if (at < 0 || !DATA.chosen[tower].includes(b + 1)) return;
      const look = { fill: TOWER[tower], opacity: how === "open" ? 0.3 : 1 };
      svg.append(vertical ? node("rect", { x: left - 5, y: top + at * tall, width: 4, height: tall, ...look })
        : node("rect", { x: left + at * cell, y: bottom + 1, width: cell, height: 4, ...look }));
    });
    if (spec.rowTower) mark(spec.rowTower, spec.rows, true);
    if (spec.columnTower) mark(spec.columnTower, spec.columns, false);
    const bar = Math.min(200, width - left - 110);
    for (let i = 0; i < 40; i++) svg.append(node("rect", { x: left + i * bar / 40, y: 14, width: bar / 40 + 0.5, height: 10, fill: colour(i / 39) }));
    svg.append(node("text", { x: left, y: 38, fill: "#55555E" }, show(low)),
      node("text", { x: left + bar, y: 38, "text-anchor": "end", fill: "#55555E" }, show(high)),
      node("text", { x: left + spec.columns.length * cell / 2, y: bottom + 62, "text-anchor": "middle", fill: "#1B1B1F" }, spec.xLabel),
      node("text", { x: 13, y: (top + bottom) / 2, "text-anchor": "middle", fill: "#1B1B1F", transform: `rotate(-90 13 ${(top + bottom) / 2})` }, spec.yLabel));
    if (DATA.random) svg.append(node("text", { x: area.right, y: 24, "text-anchor": "end", fill: "#8A1F1F", "font-weight": 600 }, "random weights"));
    const ring = svg.appendChild(node("rect", { width: cell, height: tall, fill: "none", stroke: "#fff", "stroke-width": 2, visibility: "hidden" }));
    plot.rowLength = spec.columns.length;
    explore(plot, area, names.length * spec.columns.length, (x, y) => {
      const c = Math.floor((x - left) / cell), r = Math.floor((y - top) / tall);
      return c < 0 || r < 0 || c >= spec.columns.length || r >= names.length ? -1 : r * spec.columns.length + c;
    }, (index) => {
      ring.setAttribute("visibility", index < 0 ? "hidden" : "visible");
      if (index < 0) return "";
      const r = Math.floor(index / spec.columns.length), c = index % spec.columns.length;
      ring.setAttribute("x", left + c * cell); ring.setAttribute("y", top + r * tall);
      const heading = spec.name(names[r], spec.columns[c]), said = show(spec.values[r][c]);
      placeTip(plot, area, left + (c + 1) * cell, top + r * tall, heading, [`${spec.measure} ${said}`]);
      return `${heading}: ${said}`;
    });
  };

  const barChart = (plot, spec) => {
    plot.dataset.alt = spec.alt;
    const area = frame(plot, 230, { left: 52, right: 14, top: 30, bottom: 46 });
    const { svg, left, right, top, bottom } = area;
    const X = (v) => left + (v - spec.axis.low) / (spec.axis.high - spec.axis.low) * (right - left);
    const Y = (v) => bottom - v * (bottom - top);
    for (const v of [0, 0.25, 0.5, 0.75, 1]) svg.append(
      node("line", { x1: left, x2: right, y1: Y(v), y2: Y(v), stroke: "#E3E3E8" }),
      node("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end", fill: "#55555E" }, `${v * 100} %`));
    for (const mark of spec.axis.marks) svg.append(node("text", { x: X(mark.x), y: bottom + 18, "text-anchor": "middle", fill: "#55555E" }, mark.label));
    svg.append(node("text", { x: (left + right) / 2, y: area.height - 6, "text-anchor": "middle", fill: "#1B1B1F" }, spec.axis.label));
    spec.bars.forEach((b) => svg.append(node("rect", { x: X(b.from), y: Y(b.value), width: Math.max(1, X(b.to) - X(b.from)),
      height: bottom - Y(b.value), fill: b.colour, "fill-opacity": b.standing === "firm" ? 1 : 0.38,
      stroke: b.chosen ? b.colour : "none", "stroke-width": 1.5, class: "bar" })));
    spec.legend.forEach((l, i) => svg.append(node("rect", { x: left + i * 130, y: 6, width: 12, height: 12, fill: l.colour }),
      node("text", { x: left + i * 130 + 18, y: 16, fill: "#1B1B1F" }, l.name)));
    if (DATA.random) svg.append(node("text", { x: right, y: 16, "text-anchor": "end", fill: "#8A1F1F", "font-weight": 600 }, "random weights"));
    explore(plot, area, spec.bars.length, (x, y) => y < top - 20 || y > bottom ? -1 : spec.bars.findIndex((b) => x >= X(b.from) && x <= X(b.to)), (index) => {
      if (index < 0) return "";
      const b = spec.bars[index];
      placeTip(plot, area, X(b.to), top, b.label, [`chosen in ${Math.round(b.value * 100)} % of resamples`]);
      return `${b.label}: ${Math.round(b.value * 100)} %`;
    });
  };

  const scatter = (plot, spec) => {
    plot.dataset.alt = spec.alt;
    const area = frame(plot, plot.clientWidth < 520 ? 300 : 380, { left: 58, right: 20, top: 14, bottom: 48 });
    const { svg, left, right, top, bottom } = area;
    const span = (pick) => { const v = spec.points.map(pick), a = Math.min(...v), b = Math.max(...v), pad = (b - a || 1) * 0.08; return [a - pad, b + pad]; };
    const [x0, x1] = span((p) => p.x), [y0, y1] = span((p) => p.y);
    const X = (v) => left + (v - x0) / (x1 - x0) * (right - left), Y = (v) => bottom - (v - y0) / (y1 - y0) * (bottom - top);
    for (const v of ticks(y0, y1)) svg.append(node("line", { x1: left, x2: right, y1: Y(v), y2: Y(v), stroke: "#E3E3E8" }),
      node("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end", fill: "#55555E" }, show(v)));
    for (const v of ticks(x0, x1, plot.clientWidth < 520 ? 3 : 5)) svg.append(node("text", { x: X(v), y: bottom + 18, "text-anchor": "middle", fill: "#55555E" }, show(v)));
    svg.append(node("text", { x: (left + right) / 2, y: area.height - 8, "text-anchor": "middle", fill: "#1B1B1F" }, spec.xLabel),
      node("text", { x: 13, y: (top + bottom) / 2, "text-anchor": "middle", fill: "#1B1B1F", transform: `rotate(-90 13 ${(top + bottom) / 2})` }, spec.yLabel));
    for (const p of spec.points) {
      svg.append(node("circle", { cx: X(p.x), cy: Y(p.y), r: p.chosen ? 8 : 5.5, fill: p.chosen ? "#007E5D" : p.reference ? "#B5568F" : "#0072B2",
        stroke: "#fff", "stroke-width": 1.5, class: "point" }));
      const away = X(p.x) > right - 40 ? -10 : 10; // to the left where the page would end within the word
      if (p.chosen || p.reference) svg.append(node("text", { x: X(p.x) + away, y: Y(p.y) - 8, "text-anchor": away < 0 ? "end" : "start", fill: "#1B1B1F", class: "over" },
        p.chosen ? "chosen" : p.reference));
    }
    explore(plot, area, spec.points.length, (x, y) => {
      const far = spec.points.map((p) => Math.hypot(X(p.x) - x, Y(p.y) - y)), near = far.indexOf(Math.min(...far));
      return far[near] < 30 ? near : -1;
    }, (index) => {
      if (index < 0) return "";
      const p = spec.points[index], lines = [`${spec.xLabel} ${show(p.x)}`, `${spec.yLabel} ${show(p.y)}`];
      placeTip(plot, area, X(p.x), Y(p.y), p.label, lines);
      return `${p.label}: ${lines.join(", ")}`;
    });
  };

  const table = (figure, headings, rows) => {
    const kind = (column) => rows.every((row) => typeof row[column] === "number" || row[column] === null || row[column] === undefined) && rows.length ? "number" : "";
    const place = figure.querySelector(".values");
    if (!place) return;
    const head = html("tr", {}, ...headings.map((h) => html("th", { textContent: h, scope: "col", className: kind(headings.indexOf(h)) })));
    place.replaceChildren(html("table", {}, html("thead", {}, head), html("tbody", {},
      ...rows.map((row) => html("tr", {}, ...row.map((v, column) => {
        const cell = html("td", { textContent: typeof v === "number" ? show(v) : v ?? "–", className: kind(column) });
        cell.dataset.heading = headings[column];
        return cell;
      }))))));
    figure.csv = csv([headings, ...rows]);
  };
  // A cell that a spreadsheet would run as a formula is written as text.
  const quote = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    const safe = typeof value !== "number" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  // A file travels alone: it says in its first columns which model and weights it is of. Tables that
  // set runs side by side name the weights of each themselves.
  const csv = (rows) => {
    const of = (row) => DATA.runs ? DATA.runs.find((run) => run.name === row[0]) : DATA;
    const apart = DATA.runs && rows[0][0] !== "run";
    return rows.map((row, number) => apart ? row : number ? [of(row)?.model, of(row)?.weights, ...row] : ["model", "weights", ...row])
      .map((row) => row.map(quote).join(",")).join("\r\n");
  };
  const save = (name, blob) => {
    const url = URL.createObjectURL(blob), link = html("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };
  const standalone = (svg) => {
    const copy = svg.cloneNode(true);
    copy.prepend(node("rect", { width: "100%", height: "100%", fill: "#fff" }));
    return new XMLSerializer().serializeToString(copy);
  };
  const download = (figure, kind) => {
    const svg = figure.querySelector(".plot svg"), stem = figure.dataset.chart;
    if (kind === "csv") return save(`${stem}.csv`, new Blob([figure.csv || ""], { type: "text/csv" }));
    if (!svg) return undefined;
    const text = standalone(svg);
    if (kind === "svg") return save(`${stem}.svg`, new Blob([text], { type: "image/svg+xml" }));
    const image = new Image();
    image.onload = () => {
      const canvas = html("canvas", { width: svg.viewBox.baseVal.width * 2, height: svg.viewBox.baseVal.height * 2 });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(`${stem}.png`, blob));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    return undefined;
  };

  const fill = (select, options, keep = true) => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, label]) => html("option", { value, textContent: label })));
    if (keep && options.some(([value]) => value === before)) select.value = before;
    select.closest("label").hidden = options.length < 2;
  };
  // One strip per tower under the axis: blocks that are chosen, open ones pale.
  const shade = (axis, towers) => towers.flatMap((tower, lane) => (DATA.standing?.[tower] || []).map((how, b) => ({
    from: axis.x(tower, String(b + 1)) - axis.half(tower), to: axis.x(tower, String(b + 1)) + axis.half(tower),
    colour: TOWER[tower], lane, chosen: DATA.chosen[tower].includes(b + 1), pale: how === "open" })).filter((band) => band.chosen));
  const averaged = (entries) => {
    const byPosition = new Map();
    for (const entry of entries) for (const p of entry.points) byPosition.set(p[0], [...(byPosition.get(p[0]) || []), p]);
    return [...byPosition].map(([position, ps]) => [position, ...[1, 2, 3, 4].map((k) => mean(ps.map((p) => p[k]))), ps.reduce((a, p) => a + p[5], 0), 0]);
  };
  const asPoint = (axis, tower) => ([position, value, low, high, nothing, n, seeds]) => ({ x: axis.x(tower, position),
    label: isBlock(position) ? `${title(tower)} block ${position}` : title(position), value, low, high, null: nothing, n, seeds, position });

  const caption = (figure, text) => { const place = figure.querySelector(".about"); if (place) place.textContent = text; };
  const controls = (figure) => Object.fromEntries([...figure.querySelectorAll("[data-control]")].map((c) => [c.dataset.control, c]));

  // 5–12 where both towers are adapted alike up to the end, else why the placement was trained.
  const WHY = { lower: "lower half", upper: "upper half", single: "one block", random: "random", vision: "vision only", text: "text only" };
  const shortName = (p) => {
    const [vision, text] = p.placement.split(",").map((part) => part.slice(1));
    const blocks = vision === text ? vision.replaceAll("-", "–") : p.placement.replaceAll("-", "–").replaceAll(",", ", ");
    const why = p.kind.split("+").map((k) => WHY[k]).find(Boolean);
    if (p.sweep || !why || why === "one block") return blocks.length > 15 ? `${blocks.slice(0, 14)}…` : blocks;
    return why === "random" ? `random ${p.number}` : why;
  };
  let randoms = 0;
  for (const p of DATA.validation?.points || []) if (/\brandom\b/.test(p.kind)) p.number = ++randoms;

  const charts = {
    curves(figure, c) {
      const metric = c.metric.value, here = DATA.curves.filter((e) => e.metric === metric);
      const names = unique(here.map((e) => e.dataset));
      const separate = names.filter((n) => n !== "*");
      fill(c.dataset, [...(names.includes("*") ? [["*", POOLED]] : [["", MEAN]]), ...separate.map((n) => [n, n])]);
      fill(c.space, unique(here.map((e) => e.space)).map((s) => [s, s]));
      const towers = ["vision", "text"].filter((t) => c[t].checked);
      const found = towers.map((tower) => {
        const entries = here.filter((e) => e.tower === tower && e.space === c.space.value && (c.dataset.value === "" || e.dataset === c.dataset.value));
        return [tower, entries.length > 1 ? averaged(entries) : entries[0]?.points || []];
      }).filter(([, points]) => points.length);
      const plot = figure.querySelector(".plot"), label = DATA.metrics[metric].label;
      const tail = new Set(found.flatMap(([, points]) => points.map((p) => p[0])));
      const axis = depthAxis(found.length ? found.map(([t]) => t) : ["vision"].filter((t) => t in DATA.depth), tail);
      const series = found.map(([tower, points]) => ({ name: title(tower), colour: TOWER[tower], points: points.map(asPoint(axis, tower)).sort((a, b) => a.x - b.x) }));
      const chance = chanceLines(found.map(([tower], i) => ({ tower, points: series[i].points })));
      const pooled = c.dataset.value === "*" || c.dataset.value === "";
      const fits = pooled ? towers.filter((t) => DATA.fits?.[t]?.[metric]) : [];
      for (const tower of fits) series.push({ name: `${title(tower)}, fitted`, colour: TOWER[tower], dash: "6 4", bare: true,
        points: DATA.fits[tower][metric].map((value, b) => ({ x: axis.x(tower, String(b + 1)), label: `${title(tower)} block ${b + 1}`, value, low: null, high: null })) });
      caption(figure, `${DATA.metrics[metric].caption} ${pooled ? title(datasetLabel(c.dataset.value)) : c.dataset.value}. Bands: 95 % interval over items and seeds; of a mean over datasets the mean of theirs. Under the axis: the chosen blocks, open ones pale.${fits.length ? " Dashed: the two joined lines of the rule, whose joint is the first chosen block." : ""}`);
      if (!series.length) { plot.querySelectorAll("svg").forEach((s) => s.remove()); table(figure, ["nothing to show"], []); return; }
      const most = DATA.metrics[metric].ceiling || {};
      const levels = towers.filter((t) => pooled && most[t] < 1).map((t) => ({ value: most[t], colour: TOWER[t], label: `most possible, ${t}` }));
      lineChart(plot, { series, axis, yLabel: label, chance, levels,
        shade: shade(axis, found.map(([t]) => t)), bands: c.bands.checked, alt: `${label} along depth, ${datasetLabel(c.dataset.value)}; the values are in the table below.` });
      table(figure, ["tower", "position", label, "low", "high", "chance", "n"], series.flatMap((s) => s.points.map((p) => [s.name, p.position, p.value, p.low, p.high, p.null, p.n])));
    },
    datasets(figure, c) {
      const metric = c.metric.value;
      fill(c.tower, unique(DATA.curves.filter((e) => e.metric === metric && e.dataset !== "*").map((e) => e.tower)).map((t) => [t, title(t)]));
      const tower = c.tower.value, here = DATA.curves.filter((e) => e.metric === metric && e.tower === tower && e.dataset !== "*");
      const first = here[0]?.space, entries = here.filter((e) => e.space === first), label = DATA.metrics[metric].label;
      const tail = new Set(entries.flatMap((e) => e.points.map((p) => p[0])));
      const axis = depthAxis([tower], tail);
      const plot = figure.querySelector(".plot");
      caption(figure, DATA.metrics[metric].caption);
      const rows = entries.flatMap((e) => e.points.map((p) => [e.dataset, p[0], p[1], p[2], p[3], p[4], p[5]]));
      if (c.form.value === "lines") {
        plot.rowLength = undefined;
        const points = entries.flatMap((e) => e.points.map(asPoint(axis, tower)));
        lineChart(plot, { axis, yLabel: label, shade: shade(axis, [tower]), chance: chanceLines([{ tower, points }]),
          series: entries.map((e, i) => ({ name: e.dataset, colour: COLOURS[i % COLOURS.length], dash: DASHES[Math.floor(i / 2) % DASHES.length], points: e.points.map(asPoint(axis, tower)) })),
          alt: `${label} per dataset along the ${tower} tower; the values are in the table below.` });
      } else {
        const columns = entries[0].points.map((p) => p[0]);
        heatmap(plot, { rows: entries.map((e) => e.dataset), columns, columnTower: tower, xLabel: `${title(tower)} position`, yLabel: "", measure: label,
          values: entries.map((e) => columns.map((n) => e.points.find((p) => p[0] === n)?.[1] ?? null)), name: (row, column) => `${row}, ${column}`,
          alt: `${label} per dataset and ${tower} position; the values are in the table below.` });
      }
      table(figure, ["dataset", "position", label, "low", "high", "chance", "n"], rows);
    },
    agreement(figure, c) {
      const here = DATA.matrices.filter((e) => e.metric === c.metric.value);
      fill(c.pair, unique(here.map((e) => `${e.tower} × ${e.other}`)).map((p) => [p, p]));
      const paired = here.filter((e) => `${e.tower} × ${e.other}` === c.pair.value);
      fill(c.dataset, unique(paired.map((e) => e.dataset)).map((n) => [n, datasetLabel(n)]));
      const entry = paired.find((e) => e.dataset === c.dataset.value), label = DATA.metrics[c.metric.value].label;
      caption(figure, `${DATA.metrics[c.metric.value].caption} Shown here: n = ${entry.n}. The bars at the axes mark the chosen blocks, open ones pale.`);
      heatmap(figure.querySelector(".plot"), { rows: entry.rows, columns: entry.columns, values: entry.values, square: true,
        rowTower: entry.tower, columnTower: entry.other, measure: label, xLabel: `${title(entry.other)} position`, yLabel: `${title(entry.tower)} position`,
        name: (row, column) => `${entry.tower} ${row} × ${entry.other} ${column}`, alt: `${label}, ${c.pair.value}; the values are in the table below.` });
      table(figure, [`${entry.tower} \\ ${entry.other}`, ...entry.columns], entry.rows.map((name, r) => [name, ...entry.values[r]]));
    },
    frequency(figure) {
      const towers = Object.keys(DATA.frequency), axis = depthAxis(towers, new Set());
      axis.marks = axis.marks.slice(1);
      axis.low = 0.3;
      axis.high = Math.max(...towers.map((t) => DATA.depth[t])) + 0.7;
      const bars = towers.flatMap((tower, i) => DATA.frequency[tower].map((value, b) => {
        // Bars of both towers are as wide as the deeper one allows, so that none covers another.
        const middle = axis.x(tower, String(b + 1)), half = 0.43, wide = 2 * half / towers.length;
        return { from: middle - half + i * wide, to: middle - half + (i + 1) * wide - 0.03, value, colour: TOWER[tower],
          standing: DATA.standing[tower][b], chosen: DATA.chosen[tower].includes(b + 1), label: `${title(tower)} block ${b + 1}`, block: b + 1, tower };
      })).sort((a, b) => a.from - b.from);
      barChart(figure.querySelector(".plot"), { bars, axis, legend: towers.map((t) => ({ name: title(t), colour: TOWER[t] })),
        alt: "Share of resamples in which each block is chosen; the values are in the table below." });
      table(figure, ["tower", "block", "share", "chosen", "standing"], bars.map((b) => [b.tower, String(b.block), b.value, b.chosen ? "yes" : "no", b.standing]));
    },
    sweep(figure, c) {
      const v = DATA.validation, against = c.form.value === "difference", plain = v.zero_shot;
      const key = (k) => !against ? k : k === "hm" ? "difference" : `${k}_difference`;
      const points = v.points.map((p, i) => ({ ...p, i: i + (p.sweep ? 0 : 0.6) }));
      const names = [["base", "Base", "#2F8FC4"], ["novel", "Novel", "#B34700"], ["hm", "Harmonic mean", "#222222"]]
        .filter(([k]) => c[k].checked && points.some((p) => Number.isFinite(p[key(k)])));
      const axis = { low: -0.6, high: Math.max(...points.map((p) => p.i)) + 0.6, label: "", marks: points.map((p) => ({ x: p.i, label: shortName(p) })) };
      const place = ([k], n) => (p) => ({ x: p.i + (against ? 0.16 * (n - (names.length - 1) / 2) : 0), label: p.placement, apart: !p.sweep, value: p[key(k)],
        low: p[`${key(k)}_low`] ?? null, high: p[`${key(k)}_high`] ?? null });
      const levels = plain ? names.filter(([k]) => Number.isFinite(plain[key(k)])).map(([k, , tint]) => ({ value: plain[key(k)], colour: tint })) : [];
      caption(figure, `${against ? "Test accuracy minus that of the chosen placement, in pairs of dataset and seed, with 95 % intervals." : "Mean test accuracy over datasets and seeds; its intervals stand in the table, and are wide where datasets differ."} Joined: the sweep of the first adapted block up to the last. Apart: other placements. Green: the chosen one.${plain ? " Dashed: CLIP without an adapter." : ""}`);
      const plot = figure.querySelector(".plot");
      if (!names.length) { plot.querySelectorAll("svg").forEach((old) => old.remove()); table(figure, ["nothing to show"], []); return; }
      lineChart(plot, { axis, slanted: true, yLabel: against ? "Difference (points)" : "Accuracy (%)", levels, bands: false, whiskers: against,
        shade: points.filter((p) => p.chosen).map((p) => ({ from: p.i - 0.45, to: p.i + 0.45, colour: "#007E5D" })),
        series: names.map((one, n) => ({ name: one[1], colour: one[2], points: points.map(place(one, n)).filter((p) => Number.isFinite(p.value)) })),
        alt: `${against ? "Difference of trained accuracy to the chosen placement" : "Trained accuracy"} at each placement; the values are in the table below.` });
      table(figure, ["placement", ...names.flatMap(([, name]) => [name, "low", "high"]), "parameters", "why"],
        points.map((p) => [p.placement, ...names.flatMap(([k]) => [p[key(k)] ?? null, p[`${key(k)}_low`] ?? null, p[`${key(k)}_high`] ?? null]), p.parameters ?? null, p.kind.replaceAll("+", ", ")]));
    },
    scatter(figure, c) {
      const v = DATA.validation, name = c.score.value;
      const value = (p) => name === "parameters" ? p.parameters : v.predicted[name]?.[p.placement];
      const points = v.points.map((p) => ({ ...p, label: p.placement, x: value(p), y: p.hm })).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
      const tau = v.tau[name];
      caption(figure, tau ? `Kendall's τ ${show(tau[0])}${tau[1] === null ? "" : `, 95 % interval [${show(tau[1])}, ${show(tau[2])}]`}, p ${show(tau[3])}, ${points.length} placements.` : "One point per placement.");
      const label = c.score.selectedOptions[0].text;
      if (points.length) scatter(figure.querySelector(".plot"), { points, xLabel: title(label), yLabel: "Trained harmonic mean (%)", alt: `${label} against trained harmonic mean; the values are in the table below.` });
      table(figure, ["placement", label, "hm"], points.map((p) => [p.label, p.x, p.y]));
    },
    runs(figure, c) {
      const metric = c.metric.value, tower = c.tower.value;
      const holding = DATA.runs.map((run) => [run, run.curves.filter((e) => e.metric === metric && e.tower === tower)]);
      const names = unique(holding.flatMap(([, es]) => es.map((e) => e.dataset)));
      fill(c.dataset, [...(names.includes("*") ? [["*", POOLED]] : [["", MEAN]]), ...names.filter((n) => n !== "*").map((n) => [n, n])]);
      const found = holding.map(([run, entries]) => {
        const here = entries.filter((e) => c.dataset.value === "" || e.dataset === c.dataset.value);
        return [run, here.length > 1 ? averaged(here) : here[0]?.points || []];
      }).filter(([, points]) => points.length);
      const plot = figure.querySelector(".plot"), against = c.form.value === "difference" && found.length > 1;
      const label = DATA.metrics[metric].label + (against ? `, minus ${found[0][0].name}` : "");
      caption(figure, `${DATA.metrics[metric].caption} Depth is relative, so that towers of different depth share the axis.${against ? " Differences are shown where both runs have the same depth." : ""}`);
      if (!found.length) { plot.querySelectorAll("svg").forEach((s) => s.remove()); table(figure, ["nothing to show"], []); return; }
      const where = (run) => (p) => isBlock(p) ? Number(p) / run.depth[tower] : p === "embed" ? 0 : p === "final" ? 1.05 : 1.1;
      const axis = { low: -0.03, high: 1.13, label: "Relative depth", marks: [[0, "Embed"], [0.25, "0.25"], [0.5, "0.5"], [0.75, "0.75"], [1, "1"], [1.1, "Proj"]].map(([x, l]) => ({ x, label: l })) };
      const series = found.map(([run, points]) => ({ name: run.name, colour: COLOURS[DATA.runs.indexOf(run) % COLOURS.length], dash: DASHES[Math.floor(DATA.runs.indexOf(run) / 2) % DASHES.length],
        points: points.map((p) => ({ x: where(run)(p[0]), label: isBlock(p[0]) ? `Relative depth ${show(where(run)(p[0]))}` : title(p[0]), value: p[1], low: p[2], high: p[3], position: p[0] })) }));
      if (against) {
        const first = new Map(series[0].points.map((p) => [p.x.toFixed(6), p.value]));
        for (const one of series) one.points = one.points.filter((p) => first.has(p.x.toFixed(6)))
          .map((p) => ({ ...p, value: p.value - first.get(p.x.toFixed(6)), low: null, high: null }));
      }
      lineChart(plot, { series, axis, yLabel: label, left: against ? 76 : 52, chance: [], alt: `${label} of ${series.length} runs; the values are in the table below.` });
      table(figure, ["run", "position", label, "low", "high"], series.flatMap((s) => s.points.map((p) => [s.name, p.position, p.value, p.low, p.high])));
    },
  };

  const redraw = [];
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const parts = controls(figure), draw = () => charts[figure.dataset.chart](figure, parts);
    for (const control of Object.values(parts)) control.addEventListener("change", draw);
    for (const button of figure.querySelectorAll("button[data-get]")) button.addEventListener("click", () => download(figure, button.dataset.get));
    draw();
    redraw.push(draw);
    let width = figure.clientWidth;
    new ResizeObserver(() => { if (Math.abs(figure.clientWidth - width) > 8) { width = figure.clientWidth; draw(); } }).observe(figure);
  }
  for (const button of document.querySelectorAll("button[data-table]")) button.addEventListener("click", () => {
    const rows = [...button.closest(".table").querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    save(`${button.dataset.table}.csv`, new Blob([csv(rows)], { type: "text/csv" }));
  });
  // Paper is narrower than most windows, and nothing can be unfolded on it.
  const folded = () => [...document.querySelectorAll("details:not(.screen):not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    opened = folded();
    for (const one of opened) one.open = true;
    for (const draw of redraw) draw();
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    for (const one of opened) one.open = false;
    for (const draw of redraw) draw();
  });
  document.documentElement.dataset.charts = "drawn";
})();
