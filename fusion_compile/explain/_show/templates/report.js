// The page's behaviour: links, filters, passes side by side, the memory curve's cursor, colours, keys.

// "#node-0-12" shows the 13th node of the first graph; "#finding-3" a finding, whatever the filters hide.
function follow() {
  const node = /^#node-(\d+)-(\d+)$/.exec(location.hash);
  if (node && tables.nodes) return tables.nodes.revealNode(Number(node[1]), Number(node[2]));
  if (/^#finding-\d+$/.test(location.hash)) {
    const finding = document.getElementById(location.hash.slice(1));
    if (!finding) return;
    if (finding.hidden) { chosen.severity.clear(); chosen.kind.clear(); filterFindings(); }
    finding.scrollIntoView({ block: "center" });
    finding.focus({ preventScroll: true });
  }
}

const chosen = { severity: new Set(), kind: new Set() };

function filterFindings() {
  const all = [...document.querySelectorAll(".finding")];
  const passes = (set, value) => !set.size || set.has(value);
  for (const each of all) {
    each.hidden = !(passes(chosen.severity, each.dataset.severity) && passes(chosen.kind, each.dataset.ofKind));
  }
  for (const chip of document.querySelectorAll(".chip")) {
    const on = chip.dataset.severity ? chosen.severity.has(chip.dataset.severity) : chosen.kind.has(chip.dataset.ofKind);
    chip.setAttribute("aria-pressed", String(on));
  }
  const shown = all.filter((each) => !each.hidden).length;
  document.getElementById("findings-shown").textContent = shown === all.length ? `${shown} shown` : `${shown} of ${all.length} shown`;
}

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const [set, value] = chip.dataset.severity ? [chosen.severity, chip.dataset.severity] : [chosen.kind, chip.dataset.ofKind];
    if (!set.delete(value)) set.add(value);
    filterFindings();
  });
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link) return;
  if (link.dataset.kind) {
    chosen.severity.clear();
    chosen.kind = new Set([link.dataset.kind]);
    filterFindings();
  } else if (link.dataset.search) {
    tables.nodes.find(link.dataset.search);
    tables.nodes.search.focus({ preventScroll: true });
  } else if (link.hash && link.hash === location.hash) {
    follow(); // a link to the current place fires no hashchange
  }
});

// A pass's text before and after, in two columns: the changes with three lines around each.
const AROUND = 3;

function comparisonRows(text) {
  const made = [];
  const after = text.after ?? text.before;
  const same = (i, j, length) => { for (let k = 0; k < length; k++) made.push({ left: i + k, right: j + k, same: true }); };
  const gap = (number) => { if (number > 0) made.push({ gap: number }); };
  let i = 0, j = 0;
  for (const [i1, i2, j1, j2] of text.parts) {
    const quiet = i1 - i, lead = i === 0 ? 0 : AROUND;
    if (quiet > lead + AROUND + 1) {
      same(i, j, lead);
      gap(quiet - lead - AROUND);
      same(i1 - AROUND, j1 - AROUND, AROUND);
    } else same(i, j, quiet);
    for (let k = 0; k < Math.max(i2 - i1, j2 - j1); k++) {
      made.push({ left: i1 + k < i2 ? i1 + k : -1, right: j1 + k < j2 ? j1 + k : -1, same: false });
    }
    [i, j] = [i2, j2];
  }
  if (text.parts.length) {
    const rest = Math.min(AROUND, text.before.length - i);
    same(i, j, rest);
    gap(text.before.length - i - rest);
  } else gap(text.before.length);
  return { made, before: text.before, after };
}

// The line, with the part that differs from the other line marked.
function marked(line, other) {
  if (other === null) return [line];
  let head = 0;
  while (head < Math.min(line.length, other.length) && line[head] === other[head]) head += 1;
  let tail = 0;
  while (tail < Math.min(line.length, other.length) - head && line.at(-1 - tail) === other.at(-1 - tail)) tail += 1;
  return [line.slice(0, head), element("mark", {}, line.slice(head, line.length - tail)), line.slice(line.length - tail)];
}

function showComparison(details) {
  const place = details.querySelector(".comparison");
  if (!place || place.childElementCount) return;
  const { made, before, after } = comparisonRows(rows.passes.texts[Number(details.dataset.pass)]);
  const view = element("div", { class: "view", tabindex: "0", role: "group", "aria-label": "Before and after" });
  view.style.setProperty("--columns", "minmax(0, 1fr) minmax(0, 1fr)");
  view.style.setProperty("--least", "760px");
  view.append(element("div", { class: "heads" }, element("div", { class: "names" }, element("div", {}, "before"), element("div", {}, "after"))));
  const side = (at, text, other, kind) => element("div", { class: at < 0 ? "side" : `side ${kind}`, title: at < 0 ? null : text },
    element("span", { class: "at-line" }, at < 0 ? "" : String(at + 1)),
    element("span", { class: "text" }, at < 0 ? "" : kind ? marked(text, other) : text));
  const list = new VirtualRows(view, 20, (at) => {
    const { left, right, same, gap } = made[at];
    if (gap) return element("div", { class: "row" }, element("div", { class: "gap" }, `${count(gap)} equal lines`));
    const [a, b] = [left < 0 ? null : rows.passes.lines[before[left]], right < 0 ? null : rows.passes.lines[after[right]]];
    return element("div", { class: "row" }, side(left, a, b, same ? "" : "removed"), side(right, b, a, same ? "" : "added"));
  });
  place.append(view);
  list.reset(made.length);
}

for (const details of document.querySelectorAll("details[data-pass]")) {
  details.addEventListener("toggle", () => { if (details.open) showComparison(details); });
}

// The memory curve: the pointer or the arrow keys show the bytes alive at a node.
for (const figure of document.querySelectorAll("figure[data-memory]")) {
  const g = Number(figure.dataset.memory), { curve, nodes } = rows.graphs[g];
  const start = graphStarts()[g], readout = element("p", { class: "readout" }, "Point at the curve, or focus it and press ← →.");
  figure.append(readout);
  for (const drawing of figure.querySelectorAll(".drawing")) {
    const left = Number(drawing.dataset.left), right = Number(drawing.dataset.right), last = Math.max(1, curve.length - 1);
    const cursor = element("div", { class: "cursor", hidden: true });
    drawing.append(cursor);
    let at = 0;
    for (const [key, value] of [["role", "slider"], ["tabindex", "0"], ["aria-valuemin", "0"], ["aria-valuemax", String(last)]]) {
      drawing.setAttribute(key, value);
    }
    const show = (place) => {
      at = Math.max(0, Math.min(curve.length - 1, place));
      cursor.hidden = false;
      cursor.style.left = `${100 * (left + (at / last) * (right - left))}%`;
      const text = `${size(curve[at])} alive at node ${count(at)}${at < nodes ? `, ${rows.nodes.name[start + at]}` : ""}`;
      readout.textContent = `${text}. Enter shows the node.`;
      drawing.setAttribute("aria-valuenow", String(at));
      drawing.setAttribute("aria-valuetext", text);
    };
    const pointed = (event) => {
      const box = drawing.getBoundingClientRect();
      return Math.round((((event.clientX - box.left) / box.width - left) / (right - left)) * last);
    };
    drawing.setAttribute("aria-valuenow", "0");
    drawing.addEventListener("pointermove", (event) => show(pointed(event)));
    drawing.addEventListener("click", (event) => { show(pointed(event)); location.hash = `#node-${g}-${at}`; });
    drawing.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(last / 20));
      const moves = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + far, PageDown: at - far, Home: 0, End: last };
      if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
      else if (event.key === "Enter") location.hash = `#node-${g}-${at}`;
    });
  }
}

// Colours: the system's, light or dark. The choice is kept if the browser lets a file keep one.
const THEMES = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");

function kept(value) {
  try {
    if (value !== undefined) localStorage.setItem("fusion_compile.theme", value);
    return localStorage.getItem("fusion_compile.theme");
  } catch {
    return null;
  }
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.querySelector("span").textContent = theme;
  themeButton.setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
}

setTheme(THEMES.includes(kept()) ? kept() : "system");
themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  kept(next);
  setTheme(next);
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  const table = tables.nodes ?? Object.values(tables)[0];
  if (!table) return;
  event.preventDefault();
  table.root.scrollIntoView({ block: "start" });
  table.search.focus({ preventScroll: true });
  table.search.select();
});

// On paper everything is unfolded.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) { details.open = true; if (details.dataset.pass) showComparison(details); }
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });

// Mark the section in view in the contents.
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
const seen = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) { if (isIntersecting) seen.add(target.id); else seen.delete(target.id); }
  const first = [...links.keys()].find((id) => seen.has(id));
  for (const [id, link] of links) { if (id === first) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current"); }
}, { rootMargin: "0px 0px -55% 0px" });
for (const section of document.querySelectorAll("main > section")) watcher.observe(section);

addEventListener("hashchange", follow);
follow();
