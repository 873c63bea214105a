"use strict";
// Three small charts, in SVG.

const SVG = "http://www.w3.org/2000/svg";
const FRAME = {left: 30, right: 8, top: 8, bottom: 20};

function shape(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}

// An empty chart over 0..xMost and 0..yMost: {add, x, y}, in pixels of the element as it is now.
function chart(svg, xMost, yMost, xLabel) {
  const width = svg.clientWidth || 300;
  const height = svg.clientHeight || 144;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const inner = {width: width - FRAME.left - FRAME.right, height: height - FRAME.top - FRAME.bottom};
  const x = (value) => FRAME.left + (value / (xMost || 1)) * inner.width;
  const y = (value) => FRAME.top + (1 - value / (yMost || 1)) * inner.height;
  svg.replaceChildren();
  const add = (tag, attributes, text) => svg.append(shape(tag, attributes, text));
  for (const value of [0, yMost]) {
    add("line", {class: "axis", x1: FRAME.left, x2: width - FRAME.right, y1: y(value), y2: y(value)});
    add("text", {x: FRAME.left - 6, y: y(value) + 4, "text-anchor": "end"}, tidy(value));
  }
  add("text", {x: width - FRAME.right, y: height - 5, "text-anchor": "end"}, xLabel);
  return {add, x, y};
}

const tidy = (value) => (value >= 10 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1));

// A round number that is not less.
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value);
}

// Tokens of each round: accepted drafts, and on them the target's own; a line at the mean.
function drawTau(svg, rounds, total, most, tau) {
  const {add, x, y} = chart(svg, Math.max(total, 1), most, "rounds");
  const width = Math.max(x(1) - x(0) - 1, 1);
  rounds.forEach((event, i) => {
    const own = event.next ? 1 : 0;
    add("rect", {class: "bar-accepted", x: x(i), y: y(event.accepted), width, height: y(0) - y(event.accepted)});
    add("rect", {class: "bar-own", x: x(i), y: y(event.accepted + own), width, height: y(0) - y(own)});
  });
  if (tau !== null) add("line", {class: "mean", x1: x(0), x2: x(total), y1: y(tau), y2: y(tau)});
  svg.setAttribute("aria-label", `Tokens of each round: ${count(rounds.length, "round")}, mean ${number(tau, 2)}`);
}

// Verified tokens of each round: of this request as bars, the mean of all requests as a line.
function drawBudget(svg, rounds, total, most) {
  const {add, x, y} = chart(svg, Math.max(total, 1), most, "rounds");
  const width = Math.max(x(1) - x(0) - 1, 1);
  const points = [];
  rounds.forEach((event, i) => {
    const own = event.admitted + 1;
    add("rect", {class: "bar-budget", x: x(i), y: y(own), width, height: y(0) - y(own)});
    points.push(`${x(i)},${y(event.budget)}`, `${x(i + 1)},${y(event.budget)}`);
  });
  add("polyline", {class: "drafted-line", points: points.join(" ")});
  const mean = rounds.length ? rounds.reduce((sum, event) => sum + event.budget, 0) / rounds.length : null;
  svg.setAttribute("aria-label", `Verified tokens per request and round: mean ${number(mean, 2)} of at most ${most}`);
  return mean;
}

// Tokens per second since the first token, over the clock; lines: {class, points: [[seconds, rate]]}.
function drawRates(svg, lines, xMost) {
  // The first rounds say little, and may be far out: the scale is that of the others.
  const settled = lines.flatMap(({points}) => points.filter(([at]) => at >= xMost / 6).map((point) => point[1]));
  const all = settled.length ? settled : lines.flatMap(({points}) => points.map((point) => point[1]));
  const yMost = ceiling(1.1 * Math.max(...all, 0));
  const long = xMost >= 1;
  const {add, x, y} = chart(svg, xMost, yMost, long ? `${number(xMost, 1)} s` : `${number(1e3 * xMost)} ms`);
  for (const {name, points} of lines) {
    add("polyline", {class: name, points: points.map(([at, rate]) => `${x(at)},${y(Math.min(rate, yMost))}`).join(" ")});
  }
  const now = lines.map(({label, points}) => `${label} ${number(points.at(-1)?.[1] ?? null)}`).join(", ");
  svg.setAttribute("aria-label", `Tokens per second so far: ${now}`);
}

// [[seconds, tokens per second]] of a lane up to index `last`.
function ratePoints(lane, last, seconds) {
  let time = 0;
  let tokens = 0;
  const points = [];
  for (const event of lane.events.slice(1, last + 1)) {
    const takes = seconds(event);
    if (takes === null) return [];
    time += takes;
    tokens += event.committed;
    if (time > 0) points.push([time, tokens / time]);
  }
  return points;
}
