"use strict";
// Sorting, filtering and details. Text from records only ever becomes text nodes.
(() => {
  const source = document.getElementById("data");
  const data = JSON.parse(source.textContent);
  const cells = data.cells;
  const el = (name, props = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(props)) {
      if (key === "class") made.className = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  };
  const svg = (name, props, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(props)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  // A part kept once for many cells is written as {"$": place}.
  const whole = (x) => (x !== null && typeof x === "object" && "$" in x ? data.pool[x.$] : x);
  // A figure comes as [value, low, high, the rest].
  const figures = (x) => Object.entries(x).map(([name, [value, low, high, rest]]) => [name, { ...whole(rest), value, low, high }]);
  document.documentElement.classList.add("js");

  // -- tables: rows, headings that sort -----------------------------------------------------------------------
  const rowOf = new Map(); // row number → {tr, detail, table}
  const tables = [...document.querySelectorAll("section.group")].map((section, number) => {
    const body = section.querySelector("tbody");
    const limit = Number(source.dataset.window);
    const table = { section, body, ranks: data.tables[number].ranks, rows: [], order: [], start: 0, limit, rest: section.querySelector(".rest") };
    for (const tr of body.rows) {
      const row = { number: Number(tr.id.slice(1)), tr, detail: null, table, fits: true };
      table.rows.push(row);
      rowOf.set(row.number, row);
      const head = tr.cells[0];
      const button = el("button", { type: "button", "aria-expanded": "false" }, head.textContent);
      button.setAttribute("aria-label", `${head.textContent}: details of ${cells[row.number].id}`);
      head.replaceChildren(button);
    }
    table.order = table.rows;
    table.start = table.rows[0].number;
    table.rest?.querySelector("button").addEventListener("click", () => {
      table.limit = Infinity;
      lay(table);
    });
    const headings = [...section.querySelectorAll("thead tr:last-child th")];
    headings.forEach((th, column) => {
      const button = el("button", { type: "button" });
      button.append(...th.childNodes);
      th.append(button);
      th.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, headings, th, column));
    });
    return table;
  });

  function sort(table, headings, th, column) {
    const first = th.dataset.first === "down" ? "descending" : "ascending";
    const second = first === "descending" ? "ascending" : "descending";
    const now = th.getAttribute("aria-sort");
    const next = now === "none" ? first : now === first ? second : "none"; // the third click: as at the start
    for (const other of headings) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", next);
    const ranks = table.ranks[column];
    const sign = next === "descending" ? -1 : 1;
    const rows = [...table.rows];
    if (next !== "none") {
      rows.sort((a, b) => {
        const x = ranks[a.number - table.start];
        const y = ranks[b.number - table.start];
        if (x < 0 || y < 0) return (x < 0) - (y < 0); // cells without a value stay last either way
        return sign * (x - y);
      });
    }
    const all = document.createDocumentFragment();
    for (const row of rows) all.append(row.tr, ...(row.detail ? [row.detail] : []));
    table.order = rows;
    table.body.append(all);
    lay(table);
  }

  // Show the rows that fit the filter, at first only as many as `limit`.
  function lay(table) {
    let fit = 0;
    for (const row of table.order) {
      const shown = row.fits && fit < table.limit;
      fit += row.fits;
      row.tr.hidden = !shown;
      row.tr.classList.remove("more");
      if (row.detail) row.detail.hidden = !shown;
    }
    table.section.hidden = fit === 0;
    if (table.rest) {
      table.rest.hidden = fit <= table.limit;
      table.rest.querySelector("span").textContent = `${table.limit} of ${fit} cells are shown here.`;
    }
    return fit;
  }

  // -- filter -------------------------------------------------------------------------------------------------
  const form = document.getElementById("filters");
  const text = document.getElementById("text");
  const clear = document.getElementById("clear");
  const picks = [...form.querySelectorAll(".pick")];
  const axis = (cell, name) => {
    const value = name === "status" ? cell.status : name === "run" ? cell.run : name === "device used" ? cell.machine : cell.axes[name];
    return value === null || value === undefined ? "–" : String(value);
  };
  const haystack = cells.map((c) => {
    const why = c.reason ? `${c.reason.type} ${c.reason.message} ${c.reason.step}` : "";
    return `${c.id} ${c.run} ${c.machine} ${Object.values(c.axes).join(" ")} ${c.status} ${why}`.toLowerCase();
  });
  const markers = new Map();
  for (const mark of document.querySelectorAll(".scatter [data-row]")) {
    const row = Number(mark.dataset.row);
    if (!markers.has(row)) markers.set(row, []);
    markers.get(row).push(mark);
  }

  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [];
    for (const pick of picks) {
      const chosen = [...pick.querySelectorAll("input:checked")].map((box) => box.value);
      pick.querySelector("b").textContent = chosen.length === 0 ? "all" : chosen.length === 1 ? chosen[0] : `${chosen.length} chosen`;
      pick.classList.toggle("on", chosen.length > 0);
      if (chosen.length) wanted.push([pick.dataset.axis, new Set(chosen)]);
    }
    clear.disabled = !words.length && !wanted.length;
    let shown = 0;
    for (const table of tables) {
      for (const row of table.rows) {
        const cell = cells[row.number];
        const fits = wanted.every(([name, set]) => set.has(axis(cell, name))) && words.every((w) => haystack[row.number].includes(w));
        row.fits = fits;
        for (const mark of markers.get(row.number) || []) mark.classList.toggle("off", !fits);
      }
      shown += lay(table);
    }
    document.getElementById("count").textContent = `${shown} of ${cells.length} cells`;
    document.getElementById("nothing").hidden = shown > 0;
  }
  let waiting = 0;
  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, cells.length > 500 ? 150 : 0);
  });
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  clear.addEventListener("click", () => {
    form.reset();
    filter();
    text.focus();
  });
  document.addEventListener("click", (event) => {
    for (const pick of picks) if (pick.open && !pick.contains(event.target)) pick.open = false;
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const pick of picks) {
      if (pick.open) {
        pick.open = false;
        pick.querySelector("summary").focus();
      }
    }
  });
  form.hidden = false;
  filter(); // a reloaded page may have kept its boxes ticked

  // -- details ------------------------------------------------------------------------------------------------
  const show = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "number") {
      const small = value !== 0 && Math.abs(value) < 1e-3;
      const short = Number.isInteger(value) ? value : Number(Math.abs(value) < 1000 ? value.toPrecision(4) : value.toFixed(1));
      return (small ? value.toExponential(2) : short.toLocaleString("en", { maximumFractionDigits: 8 })).replaceAll("-", "−");
    }
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  };
  const flat = (value, before = "") => {
    const found = whole(value);
    if (found === null || typeof found !== "object") return [[before, found]];
    if (Array.isArray(found) && found.length === 1) return flat(found[0], before);
    if (Array.isArray(found) && found.every((x) => x === null || typeof x !== "object")) return [[before, found.map(show).join(", ")]];
    if (before && Object.values(found).every((x) => x === null)) return [[before, "defaults"]];
    return Object.entries(found).flatMap(([key, inner]) => flat(inner, before ? `${before}.${key}` : key));
  };
  const list = (pairs) => {
    const dl = el("dl");
    for (const [name, value] of pairs) {
      if (value !== null && value !== undefined && value !== "") dl.append(el("dt", {}, name), el("dd", {}, value instanceof Node ? value : show(value)));
    }
    return dl;
  };
  const measured = (value, unit) => (unit === "bytes" && value >= 1e6 ? [show(value / 1e6), "MB"] : [show(value), unit || ""]);
  const part = (title, ...children) => el("div", { class: "part" }, el("h3", {}, title), ...children);
  const grid = (head, rows) => {
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))));
    table.append(el("tbody", {}, ...rows.map(([name, ...rest]) => el("tr", {}, el("th", { scope: "row" }, name), ...rest.map((x) => el("td", {}, x))))));
    return table;
  };
  const range = (m) => (m.low === null || m.low === undefined || m.high === null || m.high === undefined ? "–" : `${show(m.low)} to ${show(m.high)}`);

  function curve(losses) {
    const [w, h, left, bottom] = [360, 150, 40, 18];
    const names = Object.keys(losses).filter((name) => name !== "step");
    const values = names.flatMap((name) => losses[name]).filter((v) => v !== null);
    const top = Math.max(...values);
    const low = Math.min(0, ...values);
    const last = losses.step[losses.step.length - 1];
    const first = losses.step[0];
    const x = (s) => (left + ((s - first) / (last - first || 1)) * (w - left - 6)).toFixed(1);
    const y = (v) => (6 + ((top - v) / (top - low || 1)) * (h - bottom - 10)).toFixed(1);
    const drawing = svg("svg", { class: "curve", viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": `Loss from step ${first} to ${last}` });
    for (const v of [low, (low + top) / 2, top]) {
      drawing.append(svg("path", { class: "grid", d: `M${left} ${y(v)}H${w - 6}` }), svg("text", { x: left - 6, y: Number(y(v)) + 4, "text-anchor": "end" }, Number(v.toPrecision(2)).toString()));
    }
    drawing.append(svg("text", { x: left, y: h - 3 }, `step ${first}`), svg("text", { x: w - 6, y: h - 3, "text-anchor": "end" }, String(last)));
    const keys = el("ul", { class: "keys" });
    names.forEach((name, i) => {
      const points = losses.step.flatMap((s, k) => (losses[name][k] === null ? [] : [`${x(s)},${y(losses[name][k])}`]));
      drawing.append(svg("polyline", { class: `c${i}`, points: points.join(" ") }));
      if (name === "validation") drawing.append(...points.map((p) => svg("circle", { class: `c${i}`, cx: p.split(",")[0], cy: p.split(",")[1], r: 2.2 })));
      keys.append(el("li", { class: `c${i}` }, name.replace("_", ", ")));
    });
    return [drawing, keys];
  }

  function panel(cell) {
    const made = el("div", { class: "panel" }, el("p", {}, el("b", {}, cell.id), ` in ${cell.run}`));
    if (cell.reason) {
      const step = cell.reason.step ? ` at “${cell.reason.step}”` : "";
      made.append(el("p", {}, el("span", { class: `status ${cell.status}` }, cell.status), ` ${cell.reason.type}: ${cell.reason.message}${step}`));
      if (cell.reason.log) made.append(part("End of the log", el("pre", { tabindex: "0" }, cell.reason.log)));
    }
    const parts = el("div", { class: "parts" });
    const metrics = figures(cell.metrics);
    if (metrics.length) {
      const better = (m) => (m.higher_is_better === true ? " ↑" : m.higher_is_better === false ? " ↓" : "");
      parts.append(part("Metrics", grid(["", "value", "interval", "n"], metrics.map(([name, m]) => [name + better(m), show(m.value), range(m), show(m.n)]))));
    }
    const references = Object.entries(cell.references).map(([name, [id, row]]) => {
      return [name.replace("_", " "), row === null ? id : el("a", { href: `#r${row}` }, id)];
    });
    const [gap, low, high] = cell.gap;
    if (gap !== null) references.push(["gap to D", low === null ? show(gap) : `${show(gap)} (${show(low)} to ${show(high)}, paired by document)`]);
    if (references.length) parts.append(part("Compared with", list(references)));
    if (cell.losses) parts.append(part("Loss", ...curve(cell.losses)));
    if (cell.training) parts.append(part("Training", list(flat(cell.training))));
    const probes = figures(cell.probes);
    if (probes.length) {
      parts.append(part("Speed and memory", grid(["", "value", "unit", "range"], probes.map(([name, p]) => [name + (p.simulated ? " (simulated)" : ""), ...measured(p.value, p.unit), range(p)]))));
      const how = probes.find(([, p]) => p.batch);
      if (how) parts.append(part("How speed was measured", list(Object.entries(how[1]).filter(([k]) => !["value", "low", "high", "unit", "simulated"].includes(k)))));
    }
    if (cell.simulated.length) parts.append(part("Simulated", list([["what", cell.simulated.join(", ")]])));
    if (cell.compression) parts.append(part("Compression", list(flat(cell.compression))));
    if (cell.costs) parts.append(part("Cost", list(flat(cell.costs))));
    if (cell.settings) for (const [name, value] of Object.entries(cell.settings)) if (whole(value) !== null) parts.append(part(`Settings: ${name}`, list(flat(value))));
    if (cell.provenance) parts.append(part("Provenance", list(flat(cell.provenance))));
    for (const own of [...parts.children]) {
      if (own.lastChild.childNodes.length === 0) own.remove(); // a part of which nothing is set
      own.classList.toggle("long", own.querySelectorAll("dt").length > 14);
    }
    made.append(parts);
    return made;
  }

  function open(row, wanted) {
    const button = row.tr.querySelector("th button");
    if (row.detail && !wanted) {
      row.detail.remove();
      row.detail = null;
    } else if (!row.detail && wanted) {
      const columns = [...row.tr.cells].reduce((n, cell) => n + cell.colSpan, 0);
      row.detail = el("tr", { class: "detail" }, el("td", { colspan: columns }, panel(cells[row.number])));
      row.tr.after(row.detail);
    }
    button.setAttribute("aria-expanded", String(Boolean(row.detail)));
  }
  const reveal = (number) => {
    const row = rowOf.get(number);
    if (!row) return;
    if (!row.fits) {
      form.reset();
      filter();
    }
    if (row.tr.hidden) {
      row.table.limit = Infinity;
      lay(row.table);
    }
    open(row, true);
    for (const lit of document.querySelectorAll("tr.lit")) lit.classList.remove("lit");
    row.tr.classList.add("lit");
    row.tr.scrollIntoView({ block: "nearest" });
    row.tr.querySelector("th button").focus({ preventScroll: true });
  };
  document.getElementById("main").addEventListener("click", (event) => {
    const button = event.target.closest("tbody th button");
    if (button) {
      const row = rowOf.get(Number(button.closest("tr").id.slice(1)));
      open(row, !row.detail);
      return;
    }
    const link = event.target.closest('a[href^="#r"]');
    const mark = event.target.closest(".scatter g[data-row]");
    if (link || mark) {
      event.preventDefault();
      reveal(Number(link ? link.getAttribute("href").slice(2) : mark.dataset.row));
    }
  });
})();
