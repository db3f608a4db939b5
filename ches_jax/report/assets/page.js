"use strict";
(async () => {
  // ---- small helpers -------------------------------------------------------------------------------------------------
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const SVG = "http://www.w3.org/2000/svg";
  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const s = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);
  const say = (button, words) => { const old = button.textContent; button.textContent = words; setTimeout(() => (button.textContent = old), 1200); };

  function bytes(base64) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  }
  async function unpacked(name) {
    const node = document.getElementById("block-" + name);
    if (!node) return null;
    const packed = bytes(node.textContent);
    node.remove();
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")));
  }
  function saved(name, type, content) {
    const link = h("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function copied(button, text) {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = h("textarea", {}); area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    say(button, "copied");
  }

  // ---- theme, commands, figures: also on pages without a table -------------------------------------------------------
  const themes = ["", "light", "dark"], themeNames = { "": "as the system", light: "light", dark: "dark" };
  const stored = (value) => { try { if (value === undefined) return localStorage.getItem("ches-theme") || ""; localStorage.setItem("ches-theme", value); } catch { /* no storage here */ } return ""; };
  const repaints = [];
  function setTheme(name) {
    document.documentElement.dataset.theme = name;
    $("#theme").textContent = "Theme: " + themeNames[name];
    repaints.forEach((repaint) => repaint());
  }
  $("#theme").hidden = false;
  setTheme(stored());
  $("#theme").onclick = () => { const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]; stored(next); setTheme(next); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaints.forEach((repaint) => repaint()));

  $$(".command").forEach((line) => line.append(h("button", { type: "button", onclick: (event) => copied(event.target, $("code", line).textContent) }, "copy")));

  const PAINT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "font-family"];
  function standalone(svg) {
    // with the colours of the light theme written out, so that the file needs no style sheet
    const before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    const copy = svg.cloneNode(true), from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((node, i) => { const style = getComputedStyle(node); for (const name of PAINT) to[i].setAttribute(name, style.getPropertyValue(name)); to[i].removeAttribute("class"); });
    document.documentElement.dataset.theme = before;
    copy.setAttribute("xmlns", SVG);
    return new XMLSerializer().serializeToString(copy);
  }
  function saveButton(figure, make) {
    $("header", figure).append(h("button", { type: "button", class: "save", onclick: () => saved(figure.dataset.name + ".svg", "image/svg+xml", make()) }, "save SVG"));
  }
  $$("figure:not(.points)").forEach((figure) => {
    const svg = $("svg", figure), image = $("img", figure);
    if (svg) saveButton(figure, () => standalone(svg));
    else if (image && image.src.startsWith("data:image/svg+xml;base64,")) saveButton(figure, () => bytes(image.src.slice(26)));
  });

  // ---- printing: everything unfolded ---------------------------------------------------------------------------------
  let folded = [], printing = false;
  const printHooks = [];
  addEventListener("beforeprint", () => { printing = true; folded = $$("details:not([open])"); folded.forEach((d) => (d.open = true)); printHooks.forEach((hook) => hook()); });
  addEventListener("afterprint", () => { printing = false; folded.forEach((d) => (d.open = false)); printHooks.forEach((hook) => hook()); });

  // ---- the pairs -----------------------------------------------------------------------------------------------------
  const meta = JSON.parse($("#page-data").textContent);
  if (!meta.columns) { document.documentElement.dataset.ready = "1"; return; }
  const [numbers, strings] = await Promise.all([unpacked("numbers").then((r) => r.arrayBuffer()), unpacked("texts").then((r) => r.json())]);
  const N = meta.rows, columns = {}, KINDS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array };
  for (const column of meta.columns) {
    column.data = new KINDS[column.type](numbers, column.offset, N);
    const options = column.digits === null ? {} : { minimumFractionDigits: column.digits, maximumFractionDigits: column.digits };
    let format = null; // made when it is needed
    Object.defineProperty(column, "format", { get: () => (format ||= new Intl.NumberFormat("en", { ...options, signDisplay: column.signed ? "exceptZero" : "auto" })) });
    columns[column.name] = column;
  }
  const missing = (column, row) => (column.type === "f4" ? Number.isNaN(column.data[row]) : false);
  function numberText(column, value) {
    if (value !== 0 && (Math.abs(value) >= 1e9 || Math.abs(value) < 0.5 * 10 ** -(column.digits ?? 0))) {
      const power = Math.floor(Math.log10(Math.abs(value)));
      if (power >= 9 || power < -4) return `${(value / 10 ** power).toFixed(2)} × 10^${power}`;
      return value.toPrecision(2);
    }
    return column.format.format(value);
  }
  function cell(column, row) {
    if (column.kind === "word") return column.values[column.data[row]];
    return missing(column, row) ? "–" : numberText(column, column.data[row]);
  }
  const keyOf = (row) => meta.key.map((name) => (columns[name].kind === "word" ? columns[name].values[columns[name].data[row]] : String(columns[name].data[row])).replaceAll(" ", "_")).join("-");
  const BREAK = "\u0001"; // between the texts of a side; no text has it
  function lines(whole) {
    const ends = new Uint32Array(N);
    for (let row = 0, at = -1; row < N; row++) ends[row] = at = row < N - 1 ? whole.indexOf(BREAK, at + 1) : whole.length;
    return { whole, ends, at: (row) => whole.slice(row ? ends[row - 1] + 1 : 0, ends[row]) };
  }
  const texts = {};
  for (const [name, whole] of Object.entries(strings)) texts[name] = lines(whole);
  const side = (name, row) => (texts[name] ? texts[name].at(row) : "");
  const shownSides = meta.sides.filter((name) => texts[name]);

  const state = { sort: meta.sort[0], down: meta.sort[1] < 0, filters: {}, bounds: {}, query: "", open: new Set() };
  let view = new Uint32Array(0);
  const orders = {}, ROWS = 2 ** 21;
  function order(name) {
    // Positions in rising order. A key and its position share one double, so that the browser's native sort does the work.
    if (orders[name]) return orders[name];
    const column = columns[name], keys = new Float64Array(N), rows = new Uint32Array(N);
    if (!column) {
      const words = Array.from(rows, (_, row) => side(name, row).trimStart().slice(0, 60).toLowerCase()), at = rows.map((_, i) => i);
      return (orders[name] = at.sort((a, b) => (words[a] < words[b] ? -1 : words[a] > words[b] ? 1 : a - b)));
    }
    if (column.kind === "word") {
      const rank = new Float64Array(column.values.length);
      [...column.values.keys()].sort((a, b) => (column.values[a] < column.values[b] ? -1 : 1)).forEach((code, i) => (rank[code] = i));
      for (let row = 0; row < N; row++) keys[row] = rank[column.data[row]] * ROWS + row;
    } else if (column.type === "f4") {
      const bits = new Uint32Array(column.data.buffer, column.data.byteOffset, N);
      for (let row = 0; row < N; row++) {
        const b = column.data[row] === 0 ? 0 : bits[row]; // -0 is 0
        keys[row] = (Number.isNaN(column.data[row]) ? 4294967295 : b >= 2147483648 ? 4294967295 - b : b + 2147483648) * ROWS + row;
      }
    } else for (let row = 0; row < N; row++) keys[row] = (column.data[row] + 2147483648) * ROWS + row;
    keys.sort();
    for (let i = 0; i < N; i++) rows[i] = keys[i] % ROWS;
    return (orders[name] = rows);
  }
  function selected(test) {
    // rows in the order of the table; those without a number come last either way
    const rows = order(state.sort), column = columns[state.sort], out = new Uint32Array(N);
    let there = N, count = 0;
    if (column && column.type === "f4") while (there > 0 && missing(column, rows[there - 1])) there--;
    for (let i = 0; i < N; i++) {
      const row = rows[i < there && state.down ? there - 1 - i : i];
      if (test(row)) out[count++] = row;
    }
    return out.slice(0, count);
  }
  let corpus = null;
  function searched() {
    // the names of the rows and the texts of each side in small letters, which may be longer than the texts are
    if (!corpus) {
      const keys = Array.from({ length: N }, (_, row) => keyOf(row)).join(BREAK);
      corpus = [keys, ...shownSides.map((name) => texts[name].whole), ...(texts.id ? [texts.id.whole] : [])].map((whole) => lines(whole.toLowerCase()));
    }
    return corpus;
  }
  function found(words) {
    // in how many of the first words each row is found, as long as it holds them all
    const hits = new Uint8Array(N);
    words.forEach((word, k) => {
      for (const { whole, ends } of searched()) {
        for (let row = 0, at = whole.indexOf(word); at >= 0; at = whole.indexOf(word, ends[row])) {
          while (ends[row] < at) row++; // the row that holds this place
          if (hits[row] === k) hits[row] = k + 1;
        }
      }
    });
    return hits;
  }
  function keep() {
    const tests = [];
    for (const [name, word] of Object.entries(state.filters)) {
      const data = columns[name].data, code = columns[name].values.indexOf(word);
      tests.push((row) => data[row] === code);
    }
    for (const [name, [low, high]] of Object.entries(state.bounds)) {
      const data = columns[name].data;
      tests.push((row) => data[row] >= low && data[row] <= high);
    }
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean).slice(0, 255);
    if (words.length) {
      const hits = found(words);
      tests.push((row) => hits[row] === words.length);
    }
    return tests.length === 1 ? tests[0] : (row) => tests.every((test) => test(row));
  }

  // ---- the table: only the rows in sight are elements -----------------------------------------------------------------
  const box = $(".box"), body = $("tbody", box), shown = meta.columns.filter((column) => column.shown);
  const tableSides = shownSides.filter((name) => name !== "prompt");
  const narrow = matchMedia("(max-width: 40rem)");
  const spanned = () => 1 + shown.filter((column) => !narrow.matches || !column.minor).length + (narrow.matches ? Math.min(1, tableSides.length) : tableSides.length);
  const above = h("tr", { class: "space", "aria-hidden": "true" }, h("td", {}));
  const below = above.cloneNode(true);
  const heads = {};
  function head() {
    const row = $("thead tr", box), label = (column) => column.label;
    row.append(h("th", { scope: "col", class: "open" }, h("span", { class: "soft" }, "")));
    for (const column of shown) row.append((heads[column.name] = headCell(column.name, label(column), column.meaning, column.kind === "number" ? "n" : "t", column.minor)));
    for (const name of tableSides) row.append((heads[name] = headCell(name, name, "the text; its beginning where it is long", "t", name !== tableSides[0])));
    const group = h("colgroup", {}, h("col", { class: "open" }));
    const small = narrow.matches;
    for (const column of shown) group.append(h("col", { class: column.minor ? "minor" : "", width: column.kind === "number" ? (small ? 86 : 92) : column.kind === "word" ? (small ? 90 : 130) : 90 }));
    for (const name of tableSides) group.append(h("col", { class: name !== tableSides[0] ? "minor" : "" }));
    $("col.open", group).setAttribute("width", small ? 34 : 40);
    $("table", box).prepend(group);
    if (!small) $("table", box).style.minWidth = 40 + shown.length * 92 + tableSides.length * 160 + "px";
  }
  function headCell(name, label, meaning, kind, minor) {
    return h("th", { scope: "col", class: kind + (minor ? " minor" : "") }, h("button", { type: "button", title: meaning || label, onclick: () => sortBy(name) }, label, h("span", { "aria-hidden": "true" })));
  }
  function sortBy(name, down) {
    state.down = down !== undefined ? down : state.sort === name ? !state.down : columns[name] && columns[name].kind === "number" ? columns[name].down : false;
    state.sort = name;
    apply();
  }
  const rowNodes = new Map();
  function pairRow(row) {
    let nodes = rowNodes.get(row);
    if (nodes) return nodes;
    const key = keyOf(row);
    const button = h("button", { type: "button", "aria-expanded": "false", "aria-label": `pair ${key}`, onclick: (event) => { event.stopPropagation(); toggle(row); } }, "▸");
    const line = h("tr", { class: "pair", id: "row-" + key, onclick: () => toggle(row) }, h("td", {}, button));
    for (const column of shown) line.append(h("td", { class: (column.kind === "number" ? "n" : "t") + (column.minor ? " minor" : ""), dir: column.kind === "number" ? null : "auto" }, cell(column, row)));
    for (const name of tableSides) line.append(h("td", { class: "t" + (name !== tableSides[0] ? " minor" : ""), dir: "auto" }, side(name, row).trimStart().slice(0, 200)));
    nodes = { line, button, detail: null, height: 0 };
    rowNodes.set(row, nodes);
    return nodes;
  }
  let H = 34.4, opened = [];
  function place() {
    opened = [];
    if (state.open.size) view.forEach((row, i) => state.open.has(row) && opened.push(i));
  }
  const heightOf = (i) => rowNodes.get(view[i])?.height || 320;
  function topOf(i) { let y = i * H; for (const j of opened) { if (j >= i) break; y += heightOf(j); } return y; }
  function rowAt(y) {
    let more = 0;
    for (const j of opened) {
      const end = (j + 1) * H + more;
      if (y < end) break;
      if (y < end + heightOf(j)) return j;
      more += heightOf(j);
    }
    return Math.max(0, Math.floor((y - more) / H));
  }
  const PRINTED = 100;
  function render() {
    const n = view.length;
    const first = printing ? 0 : Math.max(0, rowAt(box.scrollTop) - 8);
    const last = printing ? Math.min(n, PRINTED) : Math.min(n, rowAt(box.scrollTop + (box.clientHeight || 600)) + 10);
    const nodes = [above];
    const live = new Set();
    for (let i = first; i < last; i++) {
      const row = view[i], pair = pairRow(row), open = state.open.has(row);
      live.add(row);
      pair.line.setAttribute("aria-rowindex", i + 2);
      pair.line.classList.toggle("open", open);
      pair.button.setAttribute("aria-expanded", open);
      pair.button.textContent = open ? "▾" : "▸";
      nodes.push(pair.line);
      if (open) nodes.push((pair.detail ||= detail(row)));
    }
    nodes.push(below);
    const total = topOf(n), start = topOf(first), end = printing ? total : topOf(last);
    for (const node of [above, below, ...opened.map((i) => rowNodes.get(view[i])?.detail).filter(Boolean)]) $("td", node).colSpan = spanned();
    $("td", above).style.height = start + "px";
    $("td", below).style.height = (printing ? 0 : Math.max(0, total - end)) + "px";
    const now = body.children;
    if (now.length !== nodes.length || nodes.some((node, i) => now[i] !== node)) {
      const focused = document.activeElement;
      body.replaceChildren(...nodes);
      if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
    }
    for (const row of rowNodes.keys()) if (!live.has(row) && !state.open.has(row) && rowNodes.size > 400) rowNodes.delete(row);
    let moved = false;
    for (let i = first; i < last; i++) {
      const pair = rowNodes.get(view[i]);
      if (pair && pair.detail && state.open.has(view[i])) {
        const height = pair.detail.getBoundingClientRect().height;
        if (height && Math.abs(height - pair.height) > 1) { pair.height = height; moved = true; }
      }
    }
    if (moved && !printing) $("td", below).style.height = Math.max(0, topOf(n) - topOf(last)) + "px";
  }
  let waiting = false;
  const soon = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; render(); }); } };
  box.addEventListener("scroll", soon, { passive: true });
  new ResizeObserver(soon).observe(box);
  printHooks.push(render);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], line = event.target.closest?.("tr.pair");
    if (!step || !line) return;
    event.preventDefault();
    const i = Number(line.getAttribute("aria-rowindex")) - 2 + step;
    if (i < 0 || i >= view.length) return;
    reveal(i);
    pairRow(view[i]).button.focus({ preventScroll: true });
  });
  function reveal(i, center) {
    const y = topOf(i), headHeight = $("thead", box).offsetHeight;
    if (center || y < box.scrollTop || y + H > box.scrollTop + box.clientHeight - headHeight) box.scrollTop = Math.max(0, y - (center ? 2 * H : box.clientHeight / 2));
    render();
  }
  function toggle(row, open = !state.open.has(row)) {
    if (open) state.open.add(row); else state.open.delete(row);
    if (open) current = row; else if (current === row) current = null;
    place();
    render();
    writeHash();
  }
  function show(row) {
    if (!view.includes(row)) { state.filters = {}; state.bounds = {}; state.query = ""; controls(); apply(); }
    state.open.add(row);
    current = row;
    place();
    reveal(view.indexOf(row), true);
    box.scrollIntoView({ block: "nearest" });
    pairRow(row).button.focus({ preventScroll: true });
    writeHash();
  }
  function apply() {
    const test = keep();
    view = selected(test);
    place();
    box.scrollTop = 0;
    $("table", box).setAttribute("aria-rowcount", view.length + 1);
    for (const [name, node] of Object.entries(heads)) {
      node.setAttribute("aria-sort", name === state.sort ? (state.down ? "descending" : "ascending") : "none");
      $("span", node).textContent = name === state.sort ? (state.down ? " ▼" : " ▲") : "";
    }
    $("#count").textContent = `${view.length.toLocaleString("en")} of ${N.toLocaleString("en")} ${meta.unit}`;
    $("#sort").value = state.sort;
    render();
    repaints.forEach((repaint) => repaint());
    writeHash();
  }

  // ---- one pair, unfolded ---------------------------------------------------------------------------------------------
  let tokens = null;
  function detail(row) {
    const key = keyOf(row), cut = columns._cut && columns._cut.data[row];
    const facts = h("dl", { class: "facts" });
    for (const column of meta.columns) if (!column.name.startsWith("_")) facts.append(h("div", {}, h("dt", { title: column.meaning }, column.label), h("dd", { dir: "auto" }, cell(column, row))));
    if (texts.id) facts.append(h("div", {}, h("dt", {}, "row_id"), h("dd", {}, side("id", row))));
    const content = h("div", {});
    const actions = h("div", { class: "controls" }, h("button", { type: "button", onclick: (event) => { current = row; writeHash(); copied(event.target, location.href); } }, "copy link to this pair"));
    if (meta.show) actions.append(h("span", { class: "command" }, h("code", {}, `${meta.show} ${meta.showKey ? columns[meta.showKey].data[row] : key}`)));
    function block(name) {
      const text = side(name, row);
      return h("div", {}, h("p", { class: "label " + name }, name), h("div", { class: "text", dir: "auto", tabindex: "0" }, text || "(empty)"));
    }
    if (cut) content.append(h("p", { class: "note" }, `This page holds the beginning of these texts only${meta.show ? "; the command above prints them whole" : ""}.`));
    if (shownSides.includes("prompt")) content.append(block("prompt"));
    const both = h("div", { class: "two" });
    for (const name of tableSides) both.append(block(name));
    content.append(both);
    const line = h("tr", { class: "detail" }, h("td", { colspan: spanned() }, facts, actions, content));
    if (!cut) heat(row, both);
    return line;
  }
  async function heat(row, both) {
    if (!document.getElementById("block-tokens")) return;
    tokens ||= await (await unpacked("tokens")).json();
    const mine = tokens[row];
    if (!mine) return;
    const largest = Math.max(1e-30, ...Object.values(mine).flat().map(([, value]) => Math.abs(value ?? 0)));
    const by = meta.tokens, readout = h("output", { class: "soft", "aria-live": "polite" }, "Tap a token, or go from token to token with the arrow keys, for its number.");
    both.replaceChildren();
    for (const name of tableSides) {
      const group = h("div", { class: "text tokens", dir: "auto", role: "group", "aria-label": `${name}, token by token` });
      const spans = (mine[name] || []).map(([text, value], i) => {
        const share = Math.abs(value ?? 0) / largest, red = value > 0;
        const words = value === null ? `“${text}”: shared with the other response, shown there` : `“${text}”: ${value > 0 ? "+" : ""}${Number(value.toPrecision(4))} (${by.name}), ${value > 0 ? by.up : value < 0 ? by.down : "neither"}`;
        const span = h("span", { tabindex: i ? "-1" : "0", title: words, class: share > 0.5 ? (red ? "up" : "down") : "" }, text);
        span.style.backgroundColor = `rgba(${red ? "215,48,39" : "69,117,180"},${(0.75 * share).toFixed(3)})`;
        const pick = () => (readout.textContent = words);
        span.onclick = pick;
        span.onfocus = pick;
        return span;
      });
      group.onkeydown = (event) => {
        const at = spans.indexOf(event.target), next = spans[at + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] || 0)];
        if (next && next !== event.target) { event.preventDefault(); event.stopPropagation(); event.target.tabIndex = -1; next.tabIndex = 0; next.focus(); }
      };
      group.append(...spans);
      const rest = mine[name + "_more"];
      if (rest) group.append(` … ${rest} more tokens`);
      both.append(h("div", {}, h("p", { class: "label " + name }, `${name}: ${by[name]}`), group));
    }
    both.before(h("p", { class: "soft" }, `${by.label} of each token: `, h("span", { class: "key red" }, `red, underlined: ${by.up}`), " ", h("span", { class: "key blue" }, `blue, dotted: ${by.down}`), `. The strongest colour in this pair is ±${Number(largest.toPrecision(3))}; a line marks tokens above half of it.`), readout);
    soon();
  }

  // ---- controls and the address ---------------------------------------------------------------------------------------
  function controls() {
    $("#query").value = state.query;
    $$("select[data-filter]").forEach((select) => (select.value = state.filters[select.dataset.filter] ?? ""));
    $("#bounds").textContent = Object.entries(state.bounds).map(([name, [low, high]]) => `${columns[name].label}${low > -Infinity ? " ≥ " + numberText(columns[name], low) : ""}${high < Infinity ? " ≤ " + numberText(columns[name], high) : ""}`).join(", ");
  }
  function makeControls() {
    const bar = $("#table-controls");
    const again = () => { controls(); apply(); };
    bar.append(h("label", { class: "grow" }, "search texts and rows", h("input", { id: "query", type: "search", placeholder: meta.searches, oninput: (event) => { state.query = event.target.value; apply(); } })));
    for (const column of meta.columns) {
      if (column.kind !== "word" || column.values.length < 2 || column.values.length > 300 || column.name.startsWith("_")) continue;
      const counts = new Uint32Array(column.values.length);
      for (let row = 0; row < N; row++) counts[column.data[row]]++;
      const select = h("select", { "data-filter": column.name, onchange: (event) => { if (event.target.selectedIndex) state.filters[column.name] = event.target.value; else delete state.filters[column.name]; apply(); } }, h("option", { value: "" }, "all"));
      for (const [code, word] of column.values.entries()) select.append(h("option", { value: word }, `${word || "(none)"} (${counts[code].toLocaleString("en")})`));
      bar.append(h("label", {}, column.label, select));
    }
    const sort = h("select", { id: "sort", onchange: (event) => sortBy(event.target.value) });
    for (const column of meta.columns) if (!column.name.startsWith("_")) sort.append(h("option", { value: column.name }, column.label));
    for (const name of tableSides) sort.append(h("option", { value: name }, name));
    bar.append(h("label", {}, "sort by", sort));
    bar.append(h("button", { type: "button", onclick: () => { Object.assign(state, { filters: {}, bounds: {}, query: "" }); again(); } }, "show all"));
    bar.append(h("button", { type: "button", onclick: csv, title: "the rows of the table as it is filtered and sorted now" }, "save as CSV"));
  }
  function csv() {
    const quoted = (value) => (/[",\n\r]/.test(value) ? '"' + String(value).replaceAll('"', '""') + '"' : value);
    const names = meta.columns.filter((column) => !column.name.startsWith("_"));
    const lines = [["key", ...names.map((column) => column.name), ...(texts.id ? ["row_id"] : [])].join(",")];
    for (const row of view) lines.push([keyOf(row), ...names.map((column) => (column.kind === "word" ? column.values[column.data[row]] : missing(column, row) ? "" : column.data[row])), ...(texts.id ? [side("id", row)] : [])].map((value) => quoted(String(value))).join(","));
    saved(meta.name + ".csv", "text/csv", lines.join("\n") + "\n");
  }
  let current = null, writing = true; // not before the address was read
  function address() {
    const parts = [];
    if (current !== null) parts.push("row-" + encodeURIComponent(keyOf(current)));
    if (state.query) parts.push("q=" + encodeURIComponent(state.query));
    for (const [name, word] of Object.entries(state.filters)) parts.push(`${name}=${encodeURIComponent(word)}`);
    for (const [name, [low, high]] of Object.entries(state.bounds)) {
      if (low > -Infinity) parts.push(`min.${name}=${low}`);
      if (high < Infinity) parts.push(`max.${name}=${high}`);
    }
    if (state.sort !== meta.sort[0] || state.down !== meta.sort[1] < 0) parts.push(`sort=${state.sort},${state.down ? "down" : "up"}`);
    return parts.join("&");
  }
  function writeHash() {
    if (writing) return;
    const hash = address();
    if (hash !== location.hash.slice(1) && (hash || /^#(row-|[^&=]+=)/.test(location.hash))) history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  }
  const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  function readHash() {
    const hash = location.hash.slice(1);
    if (!/^(row-|[^&=]+=)/.test(hash)) return false;
    Object.assign(state, { filters: {}, bounds: {}, query: "", sort: meta.sort[0], down: meta.sort[1] < 0 });
    let wanted = null;
    for (const part of hash.split("&")) {
      if (part.startsWith("row-")) { wanted = decoded(part.slice(4)); continue; }
      const cut = part.indexOf("="), name = decoded(part.slice(0, cut)), value = decoded(part.slice(cut + 1));
      const bound = /^(min|max)\.(.*)$/.exec(name);
      if (name === "q") state.query = value;
      else if (name === "sort") { const [by, way] = value.split(","); if (columns[by] || texts[by]) { state.sort = by; state.down = way !== "up"; } }
      else if (bound && columns[bound[2]]) (state.bounds[bound[2]] ||= [-Infinity, Infinity])[bound[1] === "min" ? 0 : 1] = Number(value);
      else if (columns[name] && columns[name].kind === "word" && columns[name].values.includes(value)) state.filters[name] = value;
    }
    writing = true;
    controls();
    apply();
    if (wanted !== null) { for (let row = 0; row < N; row++) if (keyOf(row) === wanted) { show(row); break; } }
    else box.scrollIntoView({ block: "nearest" });
    writing = false;
    return true;
  }
  addEventListener("hashchange", readHash);

  // ---- scatter figures: points on a canvas, the frame as SVG ----------------------------------------------------------
  const tip = $("#tip");
  const W = 460, T = 320, L = 66, R = 12, U = 14, B = 44;
  const SHAPES = ["circle", "square", "triangle", "cross"];
  function scatter(figure) {
    const plot = $(".plot", figure), canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": figure.dataset.alt + " Arrow keys go from point to point, Enter opens the pair." });
    const spec = { x: figure.dataset.x, y: figure.dataset.y, by: figure.dataset.by || null, regimes: figure.dataset.regimes === "1" };
    const caption = $("figcaption .clipped", figure);
    let px = new Float32Array(0), py = px, rows = view, dirty = true, seen = false, at = -1, svg = null;
    const scale = (column, low, high) => { const [a, b] = column.axis.range; return (v) => low + (Math.min(Math.max(v, a), b) - a) / (b - a || 1) * (high - low); };
    function frame() {
      const x = columns[spec.x], y = columns[spec.y], sx = scale(x, L, W - R), sy = scale(y, T - B, U);
      const parts = [];
      if (spec.regimes) {
        const zx = sx(0), zy = sy(0);
        parts.push(s("rect", { x: L, y: U, width: Math.max(0, zx - L), height: T - B - U, class: "band s1" }));
      }
      for (const tick of x.axis.ticks) parts.push(s("line", { x1: sx(tick), x2: sx(tick), y1: U, y2: T - B, class: tick === 0 ? "axis" : "grid" }), s("text", { x: sx(tick), y: T - B + 16, "text-anchor": "middle" }, x.axis.labels[x.axis.ticks.indexOf(tick)]));
      for (const tick of y.axis.ticks) parts.push(s("line", { x1: L, x2: W - R, y1: sy(tick), y2: sy(tick), class: tick === 0 ? "axis" : "grid" }), s("text", { x: L - 6, y: sy(tick) + 4, "text-anchor": "end" }, y.axis.labels[y.axis.ticks.indexOf(tick)]));
      parts.push(s("text", { x: W - R, y: T - 8, "text-anchor": "end", class: "strong" }, x.label + (x.unit ? ", " + x.unit : "")), s("text", { x: L, y: U - 3, class: "strong" }, y.label + (y.unit ? ", " + y.unit : "")));
      if (spec.regimes) {
        const low = Math.max(x.axis.range[0], y.axis.range[0]), high = Math.min(x.axis.range[1], y.axis.range[1]);
        if (high > low) parts.push(s("line", { x1: sx(low), y1: sy(low), x2: sx(high), y2: sy(high), class: "axis dashed" }));
        const zx = sx(0), left = zx - L, right = W - R - zx, up = sy(0) - U, down = T - B - sy(0); // a quarter that is too small for its name has none
        const words = [["both up", W - R - 4, U + 14, "end", right, up], ["wanted", W - R - 4, T - B - 6, "end", right, down], ["inverted", L + 4, U + 14, "start", left, up], ["both down", L + 4, T - B - 6, "start", left, down]];
        for (const [text, wx, wy, anchor, width, height] of words) if (width > 7 * text.length + 8 && height > 18) parts.push(s("text", { x: wx, y: wy, "text-anchor": anchor, class: "strong" }, text));
      }
      const fresh = s("svg", { viewBox: `0 0 ${W} ${T}`, "aria-hidden": "true" }, ...parts);
      if (svg) svg.replaceWith(fresh); else plot.prepend(fresh);
      svg = fresh;
      let outside = 0;
      for (const row of view) if (x.data[row] < x.axis.range[0] || x.data[row] > x.axis.range[1] || y.data[row] < y.axis.range[0] || y.data[row] > y.axis.range[1]) outside++;
      if (caption) caption.textContent = outside ? ` ${outside.toLocaleString("en")} of ${view.length.toLocaleString("en")} points lie beyond the frame and are drawn on its edge.` : "";
    }
    function positions() {
      const x = columns[spec.x], y = columns[spec.y], sx = scale(x, L, W - R), sy = scale(y, T - B, U);
      rows = view.filter((row) => !missing(x, row) && !missing(y, row));
      px = Float32Array.from(rows, (row) => sx(x.data[row]));
      py = Float32Array.from(rows, (row) => sy(y.data[row]));
    }
    const style = (code) => (spec.by ? ["--fourth", "--sixth", "--third", "--fifth"] : ["--chosen"])[code % (spec.by ? 4 : 1)];
    const group = (row) => (spec.by && columns[spec.by] ? columns[spec.by].data[row] : 0);
    const radius = () => Math.max(1.1, Math.min(3.4, 90 / Math.sqrt(rows.length + 1) + 0.6));
    function outline(draw, kind, x, y, r) {
      if (kind === "square") draw.rect(x - r, y - r, 2 * r, 2 * r);
      else if (kind === "triangle") { draw.moveTo(x, y - 1.2 * r); draw.lineTo(x + 1.1 * r, y + r); draw.lineTo(x - 1.1 * r, y + r); draw.closePath(); }
      else if (kind === "cross") { draw.rect(x - 1.2 * r, y - 0.4 * r, 2.4 * r, 0.8 * r); draw.rect(x - 0.4 * r, y - 1.2 * r, 0.8 * r, 2.4 * r); }
      else { draw.moveTo(x + r, y); draw.arc(x, y, r, 0, 7); }
    }
    function cloud(width, height, ratio, r, colours) {
      // many points as pixels: each is a square that lets through what lies under it, the first group on top
      const alpha = Math.max(0.15, Math.min(0.7, 12000 / rows.length)), side = Math.max(1, Math.round(2 * r * ratio));
      const image = new ImageData(width, height), out = image.data, covers = new Uint16Array(width * height);
      for (let code = colours.length - 1; code >= 0; code--) {
        covers.fill(0);
        for (let i = 0; i < rows.length; i++) {
          if (group(rows[i]) !== code) continue;
          const x0 = Math.round(px[i] * ratio - side / 2), y0 = Math.round(py[i] * ratio - side / 2);
          const x1 = Math.min(width, x0 + side), y1 = Math.min(height, y0 + side);
          for (let y = Math.max(0, y0); y < y1; y++) for (let x = Math.max(0, x0); x < x1; x++) covers[y * width + x]++;
        }
        const [red, green, blue] = colours[code].match(/[\d.]+/g).map(Number);
        for (let i = 0, at = 0; i < covers.length; i++, at += 4) {
          if (!covers[i]) continue;
          const above = 1 - (1 - alpha) ** covers[i], under = (out[at + 3] / 255) * (1 - above), whole = above + under;
          out[at] = (red * above + out[at] * under) / whole;
          out[at + 1] = (green * above + out[at + 1] * under) / whole;
          out[at + 2] = (blue * above + out[at + 2] * under) / whole;
          out[at + 3] = 255 * whole;
        }
      }
      return image;
    }
    function paint() {
      if (!seen) return;
      if (dirty) { frame(); positions(); dirty = false; at = -1; }
      const ratio = Math.max(1, devicePixelRatio) * (plot.clientWidth / W);
      canvas.width = Math.round(W * ratio);
      canvas.height = Math.round(T * ratio);
      const draw = canvas.getContext("2d"), css = getComputedStyle(document.documentElement), r = radius(), probe = h("span", {});
      plot.append(probe);
      const many = rows.length > 5000;
      const groups = spec.by && columns[spec.by] ? columns[spec.by].values.length : 1;
      const colour = (code) => { probe.style.color = `var(${style(code)})`; return getComputedStyle(probe).color; };
      if (many) draw.putImageData(cloud(canvas.width, canvas.height, ratio, r, Array.from({ length: groups }, (_, code) => colour(code))), 0, 0);
      draw.scale(ratio, ratio);
      draw.globalAlpha = 0.75;
      for (let code = groups - 1; code >= 0 && !many; code--) { // the first group counts most and lies on top
        draw.fillStyle = colour(code);
        draw.beginPath();
        for (let i = 0; i < rows.length; i++) if (group(rows[i]) === code) outline(draw, SHAPES[code % 4], px[i], py[i], r);
        draw.fill();
      }
      draw.globalAlpha = 1;
      probe.style.color = "var(--ink)";
      draw.strokeStyle = getComputedStyle(probe).color;
      draw.lineWidth = 1.6;
      for (const i of at >= 0 ? [at] : []) { draw.beginPath(); draw.arc(px[i], py[i], r + 3, 0, 7); draw.stroke(); }
      probe.remove();
    }
    let queued = false;
    const later = () => { if (!queued) { queued = true; requestAnimationFrame(() => { queued = false; paint(); }); } };
    repaints.push(() => { dirty = true; later(); });
    new IntersectionObserver((entries) => { seen = entries.some((entry) => entry.isIntersecting); if (seen) later(); }, { rootMargin: "200px" }).observe(plot);
    new ResizeObserver(later).observe(plot);
    printHooks.push(() => { seen = true; paint(); });
    function nearest(event) {
      const area = canvas.getBoundingClientRect(), x = ((event.clientX - area.left) / area.width) * W, y = ((event.clientY - area.top) / area.height) * T;
      let best = -1, least = 14 * 14;
      for (let i = 0; i < rows.length; i++) { const d = (px[i] - x) ** 2 + (py[i] - y) ** 2; if (d < least) { least = d; best = i; } }
      return best;
    }
    function tell(i) {
      if (i === at) return;
      at = i;
      later();
      tip.hidden = i < 0;
      if (i < 0) return;
      const row = rows[i], area = canvas.getBoundingClientRect();
      tip.replaceChildren(h("b", {}, `${meta.one} ${keyOf(row)}`), h("p", {}, `${columns[spec.x].label} ${cell(columns[spec.x], row)}, ${columns[spec.y].label} ${cell(columns[spec.y], row)}`), ...tableSides.map((name) => h("p", { class: name, dir: "auto" }, `${name}: ${side(name, row).trim().slice(0, 160)}`)));
      const x = area.left + (px[i] / W) * area.width, y = area.top + (py[i] / T) * area.height;
      tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + "px";
      tip.style.top = (y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 14) + "px";
    }
    canvas.onpointermove = (event) => tell(nearest(event));
    canvas.onpointerleave = canvas.onblur = () => tell(-1);
    canvas.onclick = (event) => { const i = nearest(event); if (i >= 0) { const row = rows[i]; tell(-1); show(row); } };
    let byX = null;
    canvas.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Enter" && at >= 0) { const row = rows[at]; event.preventDefault(); tell(-1); show(row); return; }
      if (event.key === "Escape") tell(-1);
      if (!step || !rows.length) return;
      event.preventDefault();
      if (!byX || byX.of !== px) { byX = { of: px, order: [...px.keys()].sort((a, b) => px[a] - px[b]) }; }
      const place = byX.order.indexOf(at);
      tell(byX.order[at < 0 ? 0 : Math.min(Math.max(place + step, 0), rows.length - 1)]);
    };
    plot.append(canvas);
    $$("select[data-axis]", figure).forEach((select) => { select.value = spec[select.dataset.axis]; select.onchange = () => { spec[select.dataset.axis] = select.value; spec.regimes = false; dirty = true; later(); }; });
    saveButton(figure, () => {
      dirty = true; seen = true; paint();
      const whole = svg.cloneNode(true), r = radius();
      plot.append(whole);
      const groups = spec.by && columns[spec.by] ? columns[spec.by].values.length : 1;
      for (let code = groups - 1; code >= 0; code--) {
        const dots = [];
        for (let i = 0; i < rows.length; i++) if (group(rows[i]) === code) dots.push(`M${px[i].toFixed(1)} ${py[i].toFixed(1)}h0`);
        const line = s("path", { d: dots.join(""), "stroke-linecap": SHAPES[code % 4] === "circle" ? "round" : "square" });
        line.style.cssText = `stroke: var(${style(code)}); stroke-width: ${2 * r}px; opacity: .7; fill: none`;
        whole.append(line);
      }
      const text = standalone(whole);
      whole.remove();
      return text;
    });
  }

  // ---- a threshold on the histogram of the leading score --------------------------------------------------------------
  $$("figure[data-threshold]").forEach((figure) => {
    const column = columns[figure.dataset.threshold], svg = $("svg", figure), slider = $("input[type=range]", figure), readout = $("output", figure), code = $("code", figure);
    const [x0, x1] = svg.dataset.span.split(",").map(Number), [low, high] = column.axis.range;
    const line = s("line", { class: "axis", y1: 8, y2: svg.viewBox.baseVal.height - 40, "stroke-width": 2 });
    svg.append(line);
    let scored = 0;
    for (let row = 0; row < N; row++) if (!missing(column, row)) scored++;
    function move() {
      const value = low + (high - low) * (slider.value / 1000), short = Number(value.toPrecision(4));
      line.setAttribute("x1", x0 + (x1 - x0) * (slider.value / 1000));
      line.setAttribute("x2", x0 + (x1 - x0) * (slider.value / 1000));
      let over = 0;
      for (const v of column.data) if (v >= short) over++;
      const words = `${column.label} from ${numberText(column, short)} on: ${over.toLocaleString("en")} of ${scored.toLocaleString("en")} pairs (${((100 * over) / Math.max(1, scored)).toFixed(1)} %)`;
      readout.textContent = words;
      slider.setAttribute("aria-valuetext", words);
      code.textContent = figure.dataset.command.replace("VALUE", short);
      return short;
    }
    slider.oninput = move;
    svg.onclick = (event) => { const area = svg.getBoundingClientRect(), x = ((event.clientX - area.left) / area.width) * svg.viewBox.baseVal.width; slider.value = Math.round((1000 * (x - x0)) / (x1 - x0)); move(); };
    $("button.look", figure).onclick = () => { state.bounds = { [column.name]: [move(), Infinity] }; controls(); apply(); box.scrollIntoView({ block: "nearest" }); };
    move();
  });

  head();
  makeControls();
  controls();
  apply();
  const line = $("tr.pair", body);
  if (line) { H = line.getBoundingClientRect().height || H; render(); }
  $$("figure.points").forEach(scatter);
  if (!readHash()) writing = false;
  document.documentElement.dataset.ready = "1";
  performance.mark("ready");
  // what the first search and the first sort need is made while nobody waits for it
  const idle = globalThis.requestIdleCallback || setTimeout;
  const later = [searched, ...shown.map((column) => () => order(column.name)), ...tableSides.map((name) => () => order(name))];
  const prepare = () => { const task = later.shift(); if (task) { task(); idle(prepare); } };
  idle(prepare);
})();
