// The columns and details of each table.

const rows = JSON.parse(document.getElementById("rows").textContent);
const tables = {};

function uncoded(column) {
  return (i) => column.values[column.codes[i]];
}

const sourceColumn = (value, width = 108) => ({ title: "source", width, value, code: true, text: (i) => splitSource(value(i) ?? "")[1],
  whole: value });

function facts(pairs) {
  return element("dl", {}, pairs.filter(([, value]) => value !== null && value !== "" && value !== undefined)
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function comma(links) {
  return links.flatMap((link, at) => (at ? [", ", link] : [link]));
}

// The nodes of all graphs form one list; a node's number in its graph is its place here minus the graph's start.
function graphStarts() {
  let start = 0;
  return rows.graphs.map((graph) => { const mine = start; start += graph.nodes; return mine; });
}

function nodesTable(root) {
  const nodes = rows.nodes, starts = graphStarts();
  const [op, region, module, where, type, binding] =
    ["op", "region", "module", "where", "type", "binding_time"].map((key) => uncoded(nodes[key]));
  const graphOf = (i) => { let g = starts.length - 1; while (starts[g] > i) g -= 1; return g; };
  const colours = new Map(rows.regions);
  const finding = (i) => (nodes.finding[i] < 0 ? null : rows.findings[nodes.finding[i]]);
  const marks = { error: "✕", warning: "▲", note: "i" };
  const moved = (i) => nodes.read[i] + nodes.written[i];
  const nodeLink = (i) => element("a", { href: `#node-${graphOf(i)}-${i - starts[graphOf(i)]}` }, element("code", {}, nodes.name[i]));
  let readers = null;
  function readersOf(i) {
    if (!readers) {
      readers = nodes.name.map(() => []);
      nodes.inputs.forEach((inputs, reader) => {
        for (const input of inputs) readers[starts[graphOf(reader)] + input].push(reader);
      });
    }
    return [...new Set(readers[i])];
  }
  const dot = (i) => element("span", { class: `dot region-${colours.get(region(i)) ?? 0}`, "aria-hidden": "true" });
  const columns = [
    { title: "#", width: 54, number: true, value: (i) => i - starts[graphOf(i)], text: (i) => String(i - starts[graphOf(i)]) },
    { title: "name", width: 132, value: (i) => nodes.name[i], code: true, cell: (i) => {
      const mine = finding(i);
      return mine ? [element("span", { class: `${mine.severity}-mark`, role: "img", "aria-label": `${mine.severity}: ${mine.kind}` },
        `${marks[mine.severity]} `), nodes.name[i]] : [nodes.name[i]];
    } },
    { title: "operator", width: 128, value: op, code: true, text: (i) => op(i).replace(/^aten\./, ""), whole: op },
    sourceColumn(where),
    { title: "region", width: 100, value: region, cell: (i) => (region(i) ? [dot(i), " ", region(i)] : []) },
    { title: "time", width: 78, number: true, bars: true, value: (i) => nodes.microseconds[i],
      text: (i) => (nodes.microseconds[i] === null ? "–" : time(nodes.microseconds[i])) },
    { title: "compute", width: 98, number: true, value: (i) => nodes.flops[i], text: (i) => flops(nodes.flops[i]) },
    { title: "moved", width: 88, number: true, value: moved, text: (i) => size(moved(i)) },
    { title: "FLOP/B", width: 72, number: true, value: (i) => nodes.intensity[i], print: false,
      text: (i) => (nodes.intensity[i] === null ? "–" : ratio(nodes.intensity[i])) },
    { title: "type", width: 160, value: type, code: true, print: false },
    { title: "module", width: 180, value: module, code: true, print: false },
    { title: "launches", width: 84, number: true, value: (i) => nodes.launches[i], text: (i) => String(nodes.launches[i] ?? "–"), print: false },
  ];
  const hasBinding = nodes.binding_time.values.some(Boolean);
  if (hasBinding) columns.splice(5, 0, { title: "known", width: 90, value: binding });
  const facets = [{ title: "all regions", value: region }];
  if (hasBinding) facets.push({ title: "all binding times", value: binding });
  if (rows.graphs.length > 1) {
    columns.splice(1, 0, { title: "graph", width: 90, value: (i) => rows.graphs[graphOf(i)].name, print: false });
    facets.unshift({ title: "all graphs", value: (i) => rows.graphs[graphOf(i)].name });
  }
  if (nodes.recomputed.some(Boolean)) {
    facets.push({ title: "computed once or again", value: (i) => (nodes.recomputed[i] ? `again: region ${nodes.recomputed[i]}` : "") });
  }
  if (nodes.finding.some((at) => at >= 0)) {
    facets.push({ title: "with or without finding", value: (i) => (finding(i) ? `${finding(i).severity}: ${finding(i).kind}` : "") });
  }
  const detail = (i) => {
    const mine = finding(i);
    const all = readersOf(i);
    return [element("h4", {}, nodes.name[i]), facts([
      ["operator", element("code", {}, op(i))],
      ["source", source(where(i))],
      ["finding", mine && element("a", { href: `#finding-${nodes.finding[i]}` }, `${mine.severity}: ${mine.kind}`)],
      ["region", region(i)], ["computed again", nodes.recomputed[i] ? `for the backward: checkpointed region ${nodes.recomputed[i]}` : null], ["module", module(i) && element("code", {}, module(i))],
      ["result", type(i) && element("code", {}, type(i))], ["known", binding(i)],
      ["time", nodes.microseconds[i] === null ? null : `${time(nodes.microseconds[i])} at least`],
      ["compute", flops(nodes.flops[i])], ["reads", size(nodes.read[i])], ["writes", size(nodes.written[i])],
      ["launches", nodes.launches[i] === null ? null : String(nodes.launches[i])],
      ["inputs", comma(nodes.inputs[i].map((input) => nodeLink(starts[graphOf(i)] + input)))],
      ["read by", all.length ? [...comma(all.slice(0, 12).map(nodeLink)), all.length > 12 ? ` and ${count(all.length - 12)} more` : ""] : null],
    ].map(([name, value]) => [name, Array.isArray(value) ? (value.length ? element("span", {}, value) : null) : value]))];
  };
  const words = (i) => [nodes.name[i], op(i), region(i), module(i), where(i), type(i), binding(i), finding(i)?.kind ?? ""].join(" ");
  const table = new VirtualTable(root, { columns, length: nodes.name.length, words, facets, detail, copied: where, paper: "time",
    hint: "Choose a node: ↑ and ↓ move, Enter goes to its details and Esc comes back, c copies its source line." });
  table.revealNode = (g, i) => table.reveal(starts[g] + i);
  return table;
}

// A link to the node of this name; a name without a node stays text. Graphs may share a name: prefer the node on one
// of these source lines.
function namedNode(name, lines = []) {
  if (!namedNode.places) {
    namedNode.places = new Map();
    rows.nodes.name.forEach((each, i) => namedNode.places.set(each, [...(namedNode.places.get(each) ?? []), i]));
  }
  const places = namedNode.places.get(name) ?? [], where = uncoded(rows.nodes.where);
  const at = places.find((i) => lines.includes(where(i))) ?? places[0];
  if (at === undefined) return element("code", {}, name);
  const starts = graphStarts();
  let g = starts.length - 1;
  while (starts[g] > at) g -= 1;
  return element("a", { href: `#node-${g}-${at - starts[g]}` }, element("code", {}, name));
}

function kernelsTable(root) {
  const { name, nodes, where, source: text, count: length } = rows.kernels;
  return new VirtualTable(root, {
    length,
    columns: [
      { title: "kernel", width: 300, value: (i) => name[i], code: true },
      { title: "nodes", width: 70, number: true, value: (i) => nodes[i].length },
      { title: "computes", width: 220, value: (i) => nodes[i].join(", "), code: true },
      { title: "source", width: 180, value: (i) => where[i].map((each) => splitSource(each)[1]).join(", "), code: true, whole: (i) => where[i].join("\n") },
    ],
    words: (i) => [name[i], ...nodes[i], ...where[i]].join(" "),
    detail: (i) => [element("h4", {}, name[i]), facts([
      ["computes", nodes[i].length ? element("span", {}, comma(nodes[i].map((each) => namedNode(each, where[i])))) : null],
      ["source", where[i].length ? element("span", {}, where[i].map((each) => element("div", {}, source(each)))) : null],
    ]), ...(text[i] ? [element("pre", { tabindex: "0", "aria-label": `Code of ${name[i]}` }, text[i])] : [])],
    hint: "Choose a kernel to see the nodes that it computes, and its code.",
  });
}

function hoistingTable(root) {
  const all = rows.hoisting;
  const word = (i) => all.decision[i].replaceAll("_", " ");
  return new VirtualTable(root, {
    length: all.count,
    columns: [
      { title: "value", width: 240, value: (i) => all.name[i], code: true },
      { title: "kind", width: 84, value: (i) => all.kind[i] },
      { title: "known", width: 90, value: (i) => all.binding_time[i] },
      { title: "decision", width: 110, value: word },
      { title: "why", width: 240, value: (i) => all.reason[i] },
      { title: "kept", width: 84, number: true, value: (i) => all.bytes[i], text: (i) => size(all.bytes[i]) },
      { title: "frees", width: 84, number: true, value: (i) => all.frees_bytes[i], text: (i) => size(all.frees_bytes[i]) },
      { title: "compute", width: 104, number: true, value: (i) => all.flops[i], text: (i) => flops(all.flops[i]) },
    ],
    facets: [{ title: "all decisions", value: word }, { title: "all binding times", value: (i) => all.binding_time[i] },
      { title: "nodes and parameters", value: (i) => all.kind[i] }],
    words: (i) => [all.name[i], all.kind[i], all.binding_time[i], word(i), all.reason[i], ...all.chain[i]].join(" "),
    detail: (i) => [element("h4", {}, all.name[i]), facts([
      ["decision", word(i)], ["why", all.reason[i]], ["known", all.binding_time[i]], ["kept", size(all.bytes[i])],
      ["frees", size(all.frees_bytes[i])], ["compute", flops(all.flops[i])],
    ]), element("p", { class: "label" }, "The chain of inputs that leads to it"),
    element("ol", {}, all.chain[i].map((each) => element("li", {}, namedNode(each))))],
    hint: "Choose a value to see the chain of inputs that decides when it is known.",
  });
}

function refusalsTable(root) {
  const { first, second, reason, count: length } = rows.refusals;
  return new VirtualTable(root, {
    length,
    columns: [
      { title: "first", width: 220, value: (i) => first[i], code: true },
      { title: "second", width: 220, value: (i) => second[i], code: true },
      { title: "why not fused", width: 380, value: (i) => reason[i] },
    ],
    words: (i) => [first[i], second[i], reason[i]].join(" "),
  });
}

function guardsTable(root) {
  const { text, where, count: length } = rows.guards;
  return new VirtualTable(root, {
    length,
    columns: [{ title: "guard", width: 560, value: (i) => text[i], code: true }, sourceColumn((i) => where[i] ?? "", 200)],
    words: (i) => `${text[i]} ${where[i]}`,
  });
}

function changedTable(root) {
  const all = rows.changed;
  return new VirtualTable(root, {
    length: all.count,
    columns: [
      { title: "operator", width: 240, value: (i) => all.op[i], code: true, text: (i) => all.op[i].replace(/^aten\./, "") },
      { title: "before", width: 70, number: true, value: (i) => all.before[i] },
      { title: "after", width: 70, number: true, value: (i) => all.after[i] },
      { title: "time", width: 96, number: true, value: (i) => all.microseconds[i], text: (i) => signedTime(all.microseconds[i]) },
      sourceColumn((i) => all.where[i], 170),
      { title: "region", width: 100, value: (i) => all.region[i] },
      { title: "type", width: 180, value: (i) => all.type[i], code: true },
    ],
    facets: [{ title: "all regions", value: (i) => all.region[i] }],
    words: (i) => [all.op[i], all.where[i], all.region[i], all.type[i]].join(" "),
  });
}

const makers = { nodes: nodesTable, kernels: kernelsTable, hoisting: hoistingTable, refusals: refusalsTable, guards: guardsTable,
  changed: changedTable };
for (const root of document.querySelectorAll("[data-table]")) tables[root.dataset.table] = makers[root.dataset.table](root);
