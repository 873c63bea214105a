"use strict";
// Two runs of one prompt, with a drafter and without, on one clock. The clock is the time that the rounds took where they
// were decoded, or what a cost table says of them; how fast it is shown is another matter. It begins with the first
// token: reading the prompt is the same with and without a drafter.

const SPEEDS = [
  {rounds: 0.5, text: "a round in 2 s"},
  {rounds: 1, text: "1 round a second"},
  {rounds: 2, text: "2 rounds a second"},
  {rounds: 4, text: "4 rounds a second"},
  {rounds: 8, text: "8 rounds a second"},
  {rounds: 20, text: "20 rounds a second"},
  {rounds: 0, text: "as fast as it was"},
];
const PHASES = [0.3, 0.6]; // share of a round after which the schedule, and then the verdict, is shown
const SLOW = 2; // rounds a second up to which the phases are shown one after the other

class Lane {
  constructor() {
    this.events = [];
    this.done = null;
  }

  take(event) {
    if (event.done) this.done = event;
    else if (event.round !== undefined) this.events.push(event);
  }

  // Numbers of the rounds up to index `last`. Without a time for one of them there is no speed.
  totals(last, seconds) {
    const found = {tokens: 0, rounds: 0, emitted: 0, accepted: 0, time: 0};
    this.events.slice(0, last + 1).forEach((event, index) => {
      found.tokens += event.committed;
      if (index === 0) return;
      const time = seconds(event);
      found.rounds += 1;
      found.accepted += event.accepted;
      found.emitted += emitted(event);
      found.time = time === null || found.time === null ? null : found.time + time;
    });
    found.tau = found.rounds ? found.emitted / found.rounds : null;
    found.rate = found.time ? (found.tokens - this.events[0].committed) / found.time : null;
    return found;
  }

  // Index of the last round that is over at a time of the clock.
  lastBefore(time, seconds) {
    let sum = 0;
    let last = this.events.length ? 0 : -1;
    for (let i = 1; i < this.events.length; i++) {
      sum += seconds(this.events[i]) ?? this.events[i].seconds;
      if (sum > time + 1e-9) break;
      last = i;
    }
    return last;
  }

  get complete() {
    return this.done !== null;
  }
}

// Accepted length of a round: the accepted drafts, and the correction or bonus.
function emitted(event) {
  return event.accepted + (event.next ? 1 : 0);
}

class Player {
  constructor(onChange) {
    this.onChange = onChange;
    this.table = null;
    this.speed = SPEEDS[2];
    this.clear();
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
  }

  clear() {
    this.drafted = new Lane();
    this.plain = new Lane();
    this.comparing = false;
    this.rewind();
    this.playing = false;
  }

  rewind() {
    this.position = -1;
    this.seen = -1; // the furthest position so far
    this.progress = 1;
    this.tail = 0; // seconds of the clock after the last round of the drafted run
  }

  seconds = (event) => (this.table ? replayedSeconds(this.table, event) : event.seconds);

  play() {
    if (this.playing) return;
    this.playing = true;
    this.last = performance.now();
    requestAnimationFrame(this.frame);
    this.onChange();
  }

  pause() {
    this.playing = false;
    this.progress = 1;
    this.onChange();
  }

  // Shows one round, whole, and waits.
  show(position) {
    if (!this.drafted.events.length) return;
    this.playing = false;
    this.position = Math.max(0, Math.min(position, this.drafted.events.length - 1));
    this.seen = Math.max(this.seen, this.position);
    this.progress = 1;
    this.tail = 0;
    this.onChange();
  }

  step() {
    if (this.position < this.drafted.events.length - 1) this.show(this.position + 1);
    else if (this.drafted.complete) {
      this.playing = false;
      this.tail = Infinity; // the rest of plain decoding
      this.onChange();
    }
  }

  frame = (now) => {
    if (!this.playing) return;
    this.advance(Math.min((now - this.last) / 1e3, 0.25));
    this.last = now;
    this.onChange();
    if (this.playing) requestAnimationFrame(this.frame);
  };

  // Goes on by some seconds of the wall clock.
  advance(wall) {
    let left = wall;
    while (left > 0) {
      const event = this.drafted.events[this.position];
      const takes = event ? this.wallSeconds(event) : 0;
      const rest = (1 - this.progress) * takes;
      if (left < rest) {
        this.progress += left / takes;
        return;
      }
      left -= rest;
      this.progress = 1;
      if (this.position + 1 >= this.drafted.events.length) break;
      this.position += 1;
      this.seen = Math.max(this.seen, this.position);
      this.progress = 0;
    }
    if (this.drafted.complete && this.atEnd) this.finish(left);
  }

  // After the last round, plain decoding goes on as fast as before, as far as it has come.
  finish(left) {
    const more = this.comparing && this.plainLast < this.plain.events.length - 1;
    if (more) this.tail += left * this.clockRate();
    else if (!this.comparing || this.plain.complete) this.playing = false;
  }

  wallSeconds(event) {
    if (event.round === 0) return 0.02;
    return this.speed.rounds ? 1 / this.speed.rounds : (this.seconds(event) ?? event.seconds);
  }

  // Seconds of the clock in a second of the wall.
  clockRate() {
    const rounds = this.drafted.events.slice(1);
    const wall = rounds.reduce((sum, event) => sum + this.wallSeconds(event), 0);
    const clock = rounds.reduce((sum, event) => sum + (this.seconds(event) ?? event.seconds), 0);
    return wall ? clock / wall : 1;
  }

  get atEnd() {
    return this.position >= this.drafted.events.length - 1 && this.progress >= 1;
  }

  get over() {
    const plain = !this.comparing || (this.plain.complete && this.plainLast >= this.plain.events.length - 1);
    return this.drafted.complete && this.atEnd && plain;
  }

  // draft, schedule or verdict: how much of the round is shown.
  get phase() {
    const slow = this.speed.rounds && this.speed.rounds <= SLOW && !this.calm.matches && this.playing;
    if (!slow || this.progress >= PHASES[1]) return "verdict";
    return this.progress < PHASES[0] ? "draft" : "schedule";
  }

  // Index of the last drafted round whose tokens are in the text.
  get committed() {
    return this.phase === "verdict" ? this.position : this.position - 1;
  }

  get plainLast() {
    if (this.position < 0 || !this.plain.events.length) return -1;
    let time = this.tail;
    this.drafted.events.slice(1, this.position + 1).forEach((event, index) => {
      const share = index + 1 === this.position ? this.progress : 1;
      time += share * (this.seconds(event) ?? event.seconds);
    });
    return this.plain.lastBefore(time, this.seconds);
  }
}
