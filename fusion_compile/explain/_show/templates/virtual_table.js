// A list of any length of which only the rows in view exist, and on it a table that sorts, searches and is read by keyboard.

const SPARE_ROWS = 12; // drawn above and below what is in view, so that a fast scroll meets no gap
const PRINTED_ROWS = 150;

class VirtualRows {
  // view: the element that scrolls. draw(place): the element of the row at that place.
  constructor(view, rowHeight, draw) {
    this.view = view;
    this.rowHeight = rowHeight;
    this.draw = draw;
    this.length = 0;
    this.rows = element("div", { class: "rows" });
    view.append(this.rows);
    view.addEventListener("scroll", () => this.refresh(), { passive: true });
    new ResizeObserver(() => this.refresh()).observe(view);
    addEventListener("beforeprint", () => this.print());
    addEventListener("afterprint", () => this.reset(this.length));
  }

  reset(length) {
    this.length = length;
    this.rows.style.height = `${length * this.rowHeight}px`;
    this.from = this.to = -1;
    this.refresh();
  }

  refresh() {
    const first = Math.floor(this.view.scrollTop / this.rowHeight);
    const from = Math.max(0, first - SPARE_ROWS);
    const to = Math.min(this.length, first + Math.ceil(this.view.clientHeight / this.rowHeight) + SPARE_ROWS);
    if (from === this.from && to === this.to) return;
    [this.from, this.to] = [from, to];
    this.show(from, to);
  }

  show(from, to) {
    const made = [];
    for (let place = from; place < to; place++) {
      const row = this.draw(place);
      row.style.transform = `translateY(${place * this.rowHeight}px)`;
      made.push(row);
    }
    this.rows.replaceChildren(...made);
  }

  print() {
    const order = this.orderForPaper?.() ?? "as they were sorted";
    this.show(0, Math.min(this.length, PRINTED_ROWS));
    if (this.length > PRINTED_ROWS) {
      this.rows.append(element("p", { class: "none" },
        `The first ${PRINTED_ROWS} of ${count(this.length)} rows, ${order}. The report on the screen has them all.`));
    }
  }

  scrollTo(place, headHeight) {
    const top = place * this.rowHeight;
    const room = this.view.clientHeight - headHeight - this.rowHeight;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top > this.view.scrollTop + room) this.view.scrollTop = top - room;
    this.refresh();
  }
}

class VirtualTable {
  // columns: {title, width, value(i), text(i)?, whole(i)?, number?, code?, bars?, print?, cell(i)?}; number columns sort from the
  // largest. words(i): the text that search looks into. facets: {title, value(i)}. detail(i): elements, or null for no pane.
  // copied(i): what the key c copies. paper: the title of the column whose largest rows are printed, if all are too many.
  constructor(root, { columns, length, words, facets = [], detail = null, copied = null, paper = null, hint = "" }) {
    Object.assign(this, { columns, total: length, words, facets, detail, copied, paper, root });
    this.label = root.dataset.label;
    this.id = `table-${root.dataset.table}`;
    this.order = Uint32Array.from({ length }, (_, i) => i);
    this.selected = -1; // a row's number in the data, not its place
    this.sorted = { column: null, down: false };
    this.haystack = null;
    for (const column of columns) {
      column.text ??= (i) => String(column.value(i) ?? "");
      if (column.bars) column.most = largest(length, column.value) || 1;
    }
    this.build(hint);
    this.update();
  }

  build(hint) {
    const name = this.label.toLowerCase();
    this.search = element("input", { type: "search", placeholder: "Search", "aria-label": `Search: ${name}`, spellcheck: "false",
      autocomplete: "off", oninput: () => this.update(), onkeydown: (event) => this.onSearchKey(event) });
    this.shown = element("output", { class: "muted" });
    this.selects = this.facets.map((facet) => {
      const values = [...new Set(Array.from({ length: this.total }, (_, i) => facet.value(i)))].filter(Boolean);
      const options = values.map((value) => element("option", { value }, value));
      return element("select", { "aria-label": facet.title, onchange: () => this.update() },
        element("option", { value: "" }, facet.title), options);
    });
    this.view = element("div", { class: "view", role: "grid", tabindex: "0", "aria-label": this.label,
      onkeydown: (event) => this.onKey(event), onclick: (event) => this.onClick(event) });
    const template = this.columns.map((column) => `minmax(${column.width}px, ${column.width}fr)`).join(" ");
    this.view.style.setProperty("--columns", template);
    this.view.style.setProperty("--least", `${this.columns.reduce((sum, column) => sum + column.width, 0)}px`);
    this.heads = this.columns.map((column) => element("div",
      { role: "columnheader", class: column.number ? "n" : null, "aria-sort": "none" },
      element("button", { type: "button", title: `Sort by ${column.title}`, onclick: () => this.sort(column) }, column.title)));
    this.names = element("div", { class: "names", role: "row", "aria-rowindex": "1" }, this.heads);
    this.view.append(element("div", { class: "heads", role: "rowgroup" }, this.names));
    this.list = new VirtualRows(this.view, 28, (place) => this.row(place));
    this.list.rows.setAttribute("role", "rowgroup");
    this.list.orderForPaper = () => this.orderForPaper();
    this.pane = this.detail && element("aside", { class: "detail", tabindex: "-1", "aria-label": `Details: ${name}`,
      onkeydown: (event) => { if (event.key === "Escape") this.view.focus(); } }, element("p", { class: "muted" }, hint));
    this.root.append(element("div", { class: "tools" }, this.search, this.selects, this.shown),
      element("div", { class: this.pane ? "panes" : "panes alone" }, this.view, this.pane));
    addEventListener("beforeprint", () => this.printColumns(true));
    addEventListener("afterprint", () => { this.printColumns(false); this.update(); });
  }

  // Puts the rows in order for paper and says which; null leaves them as the reader sorted them.
  orderForPaper() {
    const column = this.columns.find(({ title }) => title === this.paper);
    if (!column || this.sorted.column || this.order.length <= PRINTED_ROWS) return null;
    this.order.sort((a, b) => (column.value(b) ?? 0) - (column.value(a) ?? 0) || a - b);
    return `the largest ${column.title} first`;
  }

  printColumns(printing) {
    const shown = this.columns.filter((column) => !printing || column.print !== false);
    const template = shown.map((column) => `minmax(${printing ? 0 : column.width}px, ${column.width}fr)`).join(" ");
    this.view.style.setProperty("--columns", template);
    this.view.style.setProperty("--least", printing ? "0" : `${shown.reduce((sum, column) => sum + column.width, 0)}px`);
    this.columns.forEach((column, at) => {
      const away = printing && column.print === false;
      this.heads[at].hidden = away;
      for (const row of this.list.rows.querySelectorAll(".row")) row.children[at].hidden = away;
    });
  }

  row(place) {
    const i = this.order[place];
    const cells = this.columns.map((column) => {
      const text = column.text(i);
      const kind = ["cell", column.number && "n", column.code && "code", column.bars && "bars"];
      const cell = element("div", { role: "gridcell", class: kind.filter(Boolean).join(" "), title: column.whole?.(i) ?? text });
      if (column.bars) cell.style.setProperty("--part", `${(100 * (column.value(i) ?? 0)) / column.most}%`);
      cell.append(...(column.cell ? column.cell(i) : [text]));
      return cell;
    });
    return element("div", { class: "row", role: "row", id: `${this.id}-${i}`, "data-row": i, "aria-rowindex": place + 2,
      "aria-selected": i === this.selected ? "true" : "false" }, cells);
  }

  update() {
    const terms = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (terms.length && !this.haystack) {
      this.haystack = Array.from({ length: this.total }, (_, i) => this.words(i).toLowerCase());
    }
    const wanted = this.selects.map((select) => select.value);
    const kept = [];
    for (let i = 0; i < this.total; i++) {
      if (wanted.every((value, at) => !value || this.facets[at].value(i) === value)
        && terms.every((term) => this.haystack[i].includes(term))) kept.push(i);
    }
    this.order = Uint32Array.from(kept);
    const { column, down } = this.sorted;
    if (column) {
      const sign = down ? -1 : 1;
      const values = Array.from({ length: this.total }, (_, i) => column.value(i) ?? (column.number ? -Infinity : ""));
      const compare = column.number ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare;
      this.order.sort((a, b) => sign * compare(values[a], values[b]) || a - b);
    }
    this.shown.textContent = kept.length === this.total
      ? `${count(this.total)} rows` : `${count(kept.length)} of ${count(this.total)} rows`;
    this.view.setAttribute("aria-rowcount", kept.length + 1);
    this.view.querySelector(".none")?.remove();
    if (!kept.length) this.view.append(element("p", { class: "none" }, "No row has all of this."));
    this.view.scrollTop = 0;
    this.list.reset(kept.length);
  }

  sort(column) {
    const first = Boolean(column.number); // whether the first press sorts downwards
    if (this.sorted.column !== column) this.sorted = { column, down: first };
    else if (this.sorted.down === first) this.sorted = { column, down: !first };
    else this.sorted = { column: null, down: false };
    this.heads.forEach((head, at) => {
      const mine = this.sorted.column === this.columns[at];
      head.setAttribute("aria-sort", !mine ? "none" : this.sorted.down ? "descending" : "ascending");
    });
    this.update();
    say(this.sorted.column ? `Sorted by ${column.title}, ${this.sorted.down ? "descending" : "ascending"}` : "In the program's order");
  }

  find(text) {
    for (const select of this.selects) select.value = "";
    this.search.value = text;
    this.update();
  }

  // Shows row i, undoing a search or a filter that hides it.
  reveal(i) {
    if (!this.order.includes(i)) this.find("");
    this.select(i);
    this.root.scrollIntoView({ block: "nearest" });
    this.view.focus({ preventScroll: true });
  }

  select(i) {
    this.selected = i;
    this.list.scrollTo(this.order.indexOf(i), this.names.offsetHeight);
    for (const row of this.list.rows.querySelectorAll('[aria-selected="true"]')) row.setAttribute("aria-selected", "false");
    document.getElementById(`${this.id}-${i}`)?.setAttribute("aria-selected", "true");
    this.view.setAttribute("aria-activedescendant", `${this.id}-${i}`);
    if (this.pane) {
      this.pane.replaceChildren(...this.detail(i));
      this.pane.scrollTop = 0;
    }
  }

  onClick(event) {
    const row = event.target.closest(".row");
    if (row && !event.target.closest("a, button")) this.select(Number(row.dataset.row));
  }

  onSearchKey(event) {
    if (event.key === "Escape" && this.search.value) {
      event.preventDefault();
      this.search.value = "";
      this.update();
    } else if ((event.key === "ArrowDown" || event.key === "Enter") && this.order.length) {
      event.preventDefault();
      this.view.focus();
      this.select(this.order[0]);
    }
  }

  onKey(event) {
    if (event.target !== this.view || !this.order.length) return;
    const page = Math.max(1, Math.floor((this.view.clientHeight - this.names.offsetHeight) / 28) - 1);
    const here = this.order.indexOf(this.selected);
    const moves = { ArrowDown: here + 1, ArrowUp: Math.max(0, here - 1), PageDown: here + page, PageUp: here - page, Home: 0, End: Infinity };
    if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      this.select(this.order[Math.max(0, Math.min(this.order.length - 1, moves[event.key]))]);
    } else if (event.key === "Enter" && this.pane && here >= 0) {
      event.preventDefault();
      this.pane.focus();
    } else if (event.key === "c" && this.copied && here >= 0 && !event.altKey && !getSelection().toString()) {
      const text = this.copied(this.selected);
      if (text) copyText(text);
    }
  }
}

function largest(length, value) {
  let most = 0;
  for (let i = 0; i < length; i++) most = Math.max(most, value(i) ?? 0);
  return most;
}
