// Numbers and elements for all scripts of the page. Text enters the page as text nodes only.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function digits(value) {
  if (value === 0 || value >= 100) return value.toFixed(0);
  return value.toFixed(value >= 10 ? 1 : 2);
}

function scaled(value, base, units, whole) {
  let step = 0;
  while (value >= base - 0.5 && step < units.length - 1) { value /= base; step += 1; }
  return `${step === 0 && whole ? value.toFixed(0) : digits(value)} ${units[step]}`;
}

const count = (value) => value.toLocaleString("en-US");
const flops = (value) => scaled(value, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], true);
const size = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], true);
function time(value) {
  if (value >= 999500) return `${digits(value / 1e6)} s`;
  if (value >= 999.5) return `${digits(value / 1e3)} ms`;
  return value >= 0.9995 || value === 0 ? `${digits(value)} µs` : `${digits(value * 1e3)} ns`;
}
function signedTime(value) {
  return value === 0 ? "=" : `${value < 0 ? "−" : "+"}${time(Math.abs(value))}`;
}
function ratio(value) {
  return value === 0 ? "0" : value >= 1000 ? count(Math.round(value)) : String(Number(value.toPrecision(3)));
}

// "/home/a/model.py:41" -> ["/home/a/", "model.py:41"]
function splitSource(where) {
  const cut = Math.max(where.lastIndexOf("/"), where.lastIndexOf("\\")) + 1;
  return [where.slice(0, cut), where.slice(cut)];
}

function say(text) {
  document.getElementById("said").textContent = text;
}

function source(where) {
  if (!where) return element("span", { class: "muted" }, "the trace kept no source line");
  const copy = element("button", { type: "button", class: "copy", "data-copy": where, "aria-label": `Copy ${where}` }, "copy");
  return element("span", { class: "source" }, element("code", {}, where), copy);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A browser may deny the clipboard to files; the older interface still works there.
    const area = element("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`Copied ${text}`);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  copyText(button.dataset.copy).then(() => {
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  });
});
