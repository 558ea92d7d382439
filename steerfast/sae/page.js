"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SHOWN = 20;
const $ = (id) => document.getElementById(id);
const features = data.features;
const place = new Map(features.map((one, i) => [one.n, i]));
const state = { found: [], start: 0, at: 0 };

// Everything that is shown goes through text nodes: no text of a corpus is ever read as HTML.
function make(tag, parts = [], attributes = {}) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...(Array.isArray(parts) ? parts : [parts]));
  return node;
}

const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(3))));
const percent = (x) => `${short(100 * x)} %`;
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function fits(word, asked) {
  if (word.length > 1 && word.endsWith("*")) return asked.startsWith(word.slice(0, -1)) ? 2 : word.includes(asked) ? 1 : 0;
  if (word.length > 1 && word.startsWith("*")) return asked.endsWith(word.slice(1)) ? 2 : word.includes(asked) ? 1 : 0;
  return word === asked ? 3 : word.includes(asked) ? 1 : 0;
}

// Without regard to capitals, as the words were told apart: "ß" is "ss".
const fold = (text) => text.toUpperCase().toLowerCase();

for (const one of features) {
  one.low = one.w.map(fold);
  one.logits = (one.r || []).map((token) => fold(token.trim()));
}

// How well a feature fits what is asked for: its number, a word of its own, a logit that it raises; 0: not at all.
function fit(one, asked) {
  let sum = 0;
  for (const part of asked) {
    const best = Math.max(one.n === Number(part) ? 4 : 0, one.logits.includes(part) ? 0.5 : 0, ...one.low.map((word, i) => fits(word, part) * (1 - i / 100)));
    if (best === 0) return 0;
    sum += best;
  }
  return sum;
}

const orders = {
  best: () => 0,
  detection: (a, b) => (b.d ?? -1) - (a.d ?? -1),
  intruder: (a, b) => (b.i ?? -1) - (a.i ?? -1),
  dense: (a, b) => (b.f ?? 0) - (a.f ?? 0),
  rare: (a, b) => (a.f ?? 0) - (b.f ?? 0),
  number: (a, b) => a.n - b.n,
};

function search() {
  const asked = fold($("search").value).split(/\s+/).filter(Boolean);
  let found = features.slice().sort(orders[$("order").value]);
  if (asked.length) {
    const fitting = new Map(found.map((one) => [one, fit(one, asked)]));
    found = found.filter((one) => fitting.get(one) > 0).sort((a, b) => fitting.get(b) - fitting.get(a));
  }
  Object.assign(state, { found, start: 0, at: 0 });
  show(false);
}

function histogram(one) {
  const [first, counts] = one.h;
  const top = Math.sqrt(Math.max(...counts));
  const ns = document.getElementById("shape").namespaceURI;
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length * 10} 50`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const low = short(data.edges[first]), high = short(data.edges[first + counts.length]);
  svg.setAttribute("aria-label", `activations from ${low} to ${high}, by half octaves`);
  counts.forEach((count, i) => {
    const bar = document.createElementNS(ns, "rect");
    const height = (50 * Math.sqrt(count)) / top;
    for (const [name, value] of Object.entries({ x: i * 10 + 1, y: 50 - height, width: 8, height })) bar.setAttribute(name, value);
    const title = document.createElementNS(ns, "title");
    title.textContent = `${short(data.edges[first + i])} to ${short(data.edges[first + i + 1])}: ${count} tokens`;
    bar.append(title);
    svg.append(bar);
  });
  return [make("h3", `activations, ${low} to ${high} (half octaves; height: square root)`), svg];
}

function passage([value, text, sizes, levels]) {
  const shown = make("p");
  let at = 0;
  for (let i = 0; i < sizes.length; i++) {
    const size = sizes.charCodeAt(i) - 96;
    const piece = visible(text.slice(at, at + size));
    const level = Number(levels[i] || 0);
    shown.append(level ? make("mark", piece, { class: `m${level}`, title: `${level}/9 of the strongest` }) : piece);
    at += size;
  }
  return make("li", [make("b", short(value)), shown]);
}

const tokens = (title, list) => [make("h3", title), make("div", list.map((token) => make("code", visible(token))), { class: "tokens" })];

function article(one) {
  const facts = [];
  if (one.d !== undefined) facts.push(`detection ${one.d.toFixed(2)}`);
  if (one.i !== undefined) facts.push(`intruder ${one.i.toFixed(2)}`);
  if (one.f !== undefined) facts.push(`fires on ${percent(one.f)} of tokens`);
  facts.push(one.s === undefined ? "no word tells when it fires" : `${short(one.s)} nats`);
  const words = make("ul", one.w.map((word) => make("li", word)), { class: "words" });
  const header = make("header", [make("h2", make("a", `Feature ${one.n}`, { href: `#${one.n}` })), ` `, make("span", facts.join(" · "), { class: "quiet" }), words]);
  const left = make("div");
  if (one.h) left.append(...histogram(one));
  if (one.r) left.append(...tokens("logits raised", one.r), ...tokens("logits lowered", one.l));
  if (one.c) {
    const links = one.c.flatMap(([n, cosine]) => [make("a", String(n), { href: `#${n}` }), ` ${cosine.toFixed(2)}  `]);
    left.append(make("h3", "nearest features, cosine"), make("div", links));
  }
  const right = make("div", one.p ? make("ol", one.p.map(passage), { class: "passages" }) : []);
  return make("article", [header, left, right], { id: `f${one.n}`, tabindex: "-1", "aria-label": `feature ${one.n}` });
}

function show(focus = true) {
  const part = state.found.slice(state.start, state.start + SHOWN);
  $("list").replaceChildren(...part.map(article));
  const last = state.start + part.length;
  $("count").textContent = part.length ? `${state.start + 1}–${last} of ${state.found.length}` : "nothing found";
  $("back").disabled = state.start === 0;
  $("next").disabled = last >= state.found.length;
  if (focus) mark();
}

function mark() {
  const node = $("list").children[state.at];
  if (!node) return;
  node.focus({ preventScroll: true });
  node.scrollIntoView({ block: "start" });
}

function turn(by) {
  const start = state.start + by * SHOWN;
  if (start < 0 || start >= state.found.length) return false;
  Object.assign(state, { start, at: 0 });
  show();
  return true;
}

function step(by) {
  const inside = $("list").contains(document.activeElement);
  const next = inside ? state.at + by : state.at;
  if (next >= 0 && next < $("list").children.length) {
    state.at = next;
    mark();
  } else if (turn(by) && by < 0) {
    state.at = $("list").children.length - 1;
    mark();
  }
}

// A link to a feature shows it, whatever was searched for.
function follow() {
  const number = Number(location.hash.slice(1));
  if (!location.hash || !place.has(number)) return;
  let index = state.found.indexOf(features[place.get(number)]);
  if (index < 0) {
    $("search").value = "";
    search();
    index = state.found.indexOf(features[place.get(number)]);
  }
  state.start = index - (index % SHOWN);
  state.at = index % SHOWN;
  show();
}

const keys = {
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  n: () => turn(1), ArrowRight: () => turn(1), p: () => turn(-1), ArrowLeft: () => turn(-1),
  "/": () => $("search").focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (typing && event.key === "Escape") {
    $("search").value = "";
    search();
    event.target.blur();
  } else if (event.target === $("search") && event.key === "Enter") {
    state.at = 0;
    mark();
  } else if (!typing && Object.hasOwn(keys, event.key)) {
    event.preventDefault();
    keys[event.key]();
  }
});
$("list").addEventListener("focusin", (event) => {
  const node = event.target.closest("article");
  if (node) state.at = [...$("list").children].indexOf(node);
});
$("search").addEventListener("input", search);
$("order").addEventListener("change", search);
$("back").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
window.addEventListener("hashchange", follow);
search();
follow();
