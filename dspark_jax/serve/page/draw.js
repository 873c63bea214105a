"use strict";
// Drawing: a round as chips, answers, charts, the list of rounds.

const byId = (id) => document.getElementById(id);

function make(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

const number = (value, digits = 0) => (value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits));
const percent = (value) => `${Math.round(100 * value)} %`;
const count = (value, one, many = `${one}s`) => `${value} ${value === 1 ? one : many}`;

// What became of each draft of a round.
const FATES = {
  accepted: {sign: "✓", word: "accepted"},
  rejected: {sign: "✕", word: "rejected"},
  void: {sign: "⌀", word: "void"},
  skipped: {sign: "–", word: "not verified"},
  ended: {sign: "■", word: "not used"},
  waiting: {sign: "", word: "guessed"},
};

function fateOf(event, k) {
  if (k < event.accepted) return "accepted";
  if (k >= event.admitted) return event.next ? "skipped" : "ended"; // an accepted stop token ends the answer
  return k === event.accepted ? "rejected" : "void";
}

// What the target's own token is called: it replaces a rejected draft, or is one more.
function ownWord(event) {
  if (!event.admitted) return "written";
  return event.accepted < event.admitted ? "correction" : "bonus";
}

// A token's text with its spaces and line ends made visible.
function tokenText(text) {
  const node = make("span", "token");
  for (const part of text.split(/( |\n|\t)/)) {
    const shown = {" ": "·", "\n": "↵", "\t": "⇥"}[part];
    if (shown) node.append(make("i", "", shown));
    else if (part) node.append(part);
  }
  return node;
}

function spoken(text) {
  return text.trim() ? `“${text.trim()}”` : text.includes("\n") ? "a line end" : text ? "a space" : "nothing";
}

function chip(kind, sign, word, text, confidence) {
  const node = make("li", `chip ${kind}`);
  const head = make("span", "word", word);
  if (sign) {
    const mark = make("span", "", `${sign} `);
    mark.setAttribute("aria-hidden", "true");
    head.prepend(mark);
  }
  node.append(head, tokenText(text));
  if (confidence === undefined) return node;
  const sure = make("span", "sure", confidence === null ? "no confidence" : percent(confidence));
  if (confidence !== null) {
    sure.title = `The drafter gives it a chance of ${percent(confidence)} to be accepted if all before it are`;
    const bar = make("span", "bar");
    const fill = make("span");
    fill.style.width = percent(confidence).replace(" ", "");
    bar.append(fill);
    sure.append(bar);
  }
  node.append(sure);
  return node;
}

function group(kind, label, chips) {
  const node = make("div", `group ${kind}`);
  const list = make("ol");
  list.append(...chips);
  node.append(make("p", "", label), list);
  return node;
}

// One round. phase: draft (guesses alone), schedule (and where they are cut), verdict (and what became of them).
function drawBlock(node, event, before, phase) {
  const parts = [];
  if (before) parts.push(group("anchor", "the last token", [chip("anchor", "", "so far", before)]));
  // What lies after an accepted stop token may have been verified as well; nobody knows before the verdict.
  const admitted = phase === "draft" || (phase === "schedule" && !event.next) ? event.drafted.length : event.admitted;
  const drafts = event.drafted.map((token, k) => {
    const cut = phase !== "draft" && k >= admitted;
    const fate = phase === "verdict" || cut ? fateOf(event, k) : "waiting";
    return chip(fate, FATES[fate].sign, FATES[fate].word, token.text, token.confidence);
  });
  if (drafts.length) {
    const label = phase === "draft" ? "the drafter guesses" : "checked in one pass";
    if (admitted) parts.push(group("checked", label, drafts.slice(0, admitted)));
    const rest = event.next ? "left out by the scheduler" : "the answer has ended";
    if (admitted < drafts.length) parts.push(group("left-out", rest, drafts.slice(admitted)));
  }
  if (phase === "verdict" && event.next) {
    parts.push(group("target", "the target's own", [chip("own", "★", ownWord(event), event.next.text)]));
  }
  node.replaceChildren(...parts);
}

// The round in a sentence or two.
function story(event, phase) {
  if (event.round === 0) return "The target has read the prompt, and gives the first token with it.";
  const drafts = event.drafted.length;
  if (!drafts) return "In this round nothing was drafted: the target wrote one token, as in plain decoding.";
  const drafted = `The drafter guessed ${count(drafts, "token")}.`;
  if (phase === "draft") return drafted;
  if (phase === "schedule" && !event.next) return drafted;
  const left = event.admitted === drafts ? "all of them" : `the first ${event.admitted}`;
  const checked = event.next ? `The target checked ${left}.` : "";
  const verified = event.admitted ? checked : "The scheduler let none of them be checked.";
  if (phase === "schedule") return `${drafted} ${verified}`;
  return `${drafted} ${verified} ${outcome(event)}`;
}

function outcome(event) {
  const own = event.next ? spoken(event.next.text) : "";
  const gain = `${count(emitted(event), "new token")} in one pass.`;
  if (!event.next) {
    const last = event.accepted === 1 ? "The first was accepted, and" : `The first ${event.accepted} were accepted; the last one`;
    return `${last} ends the answer: ${gain}`;
  }
  if (!event.admitted) return `The target wrote ${own} itself: ${gain}`;
  if (event.accepted === event.admitted) {
    return `It agreed with ${event.accepted === 1 ? "it" : "every one"}, and added ${own}: ${gain}`;
  }
  const first = event.accepted ? `It agreed with ${event.accepted}, ` : "It agreed with none: ";
  return `${first}rejected ${spoken(event.drafted[event.accepted].text)} and wrote ${own} instead: ${gain}`;
}

// An answer, a span for every round, so that one sees what came together. Spans are added and removed at the end only.
function drawText(node, events, last) {
  while (node.children.length > last + 1) node.lastElementChild.remove();
  for (let i = node.children.length; i <= last; i++) node.append(make("span", "given", events[i].text));
  for (const span of node.querySelectorAll(".newest")) span.classList.remove("newest");
  node.lastElementChild?.classList.add("newest");
  node.scrollTop = node.scrollHeight;
}

const cell = (fate, text = "") => make("i", fate, text);

// The list of all rounds; those after `last` are hidden, the shown one is marked.
function drawRounds(list, events, last, shown, onChoose) {
  while (list.children.length > events.length) list.lastElementChild.remove();
  for (let i = list.children.length; i < events.length; i++) list.append(roundItem(events[i], () => onChoose(i)));
  [...list.children].forEach((item, i) => {
    item.hidden = i > last;
    const button = item.firstElementChild;
    if (i === shown) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  const current = list.children[shown];
  if (current) list.scrollTop = Math.max(0, current.offsetTop - list.offsetTop - list.clientHeight / 2);
}

function roundItem(event, onClick) {
  const button = make("button");
  button.type = "button";
  const cells = make("span", "cells");
  cells.setAttribute("aria-hidden", "true");
  event.drafted.forEach((token, k) => {
    const fate = fateOf(event, k);
    cells.append(cell(fate, fate === "rejected" ? "×" : ""));
  });
  if (event.next) cells.append(cell("own"));
  const gained = event.round === 0 ? 1 : emitted(event);
  const what = event.drafted.length
    ? `${event.accepted} of ${count(event.drafted.length, "draft")} accepted, ${event.admitted} verified`
    : "no drafts";
  button.setAttribute("aria-label", `Round ${event.round}: ${what}, ${count(gained, "token")}`);
  const gain = make("span", "", `+${gained}`);
  button.append(make("span", "number", String(event.round)), cells, gain);
  button.addEventListener("click", onClick);
  const item = make("li");
  item.append(button);
  return item;
}
