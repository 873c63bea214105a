"use strict";
// Where rounds come from: the server that has sent this page, or a recording inside it. Both have
//   state()                          what there is to choose from
//   run(ask, onEvent, signal)        calls onEvent with every event of serve/rounds.py, until `done`
//   load(users, ask), unload()       background users
//   watch(onMetrics, onGone)         the server's numbers, twice a second

class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const GONE = "The server does not answer. Is it still running? This page tries again by itself.";

class LiveSource {
  constructor() {
    this.live = true;
    this.key = "";
  }

  async ask(method, path, body, signal) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {method, headers, signal, body: body && JSON.stringify(body)});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(GONE);
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const message = said?.error?.message ?? `${path}: status ${response.status}`;
    const after = response.headers.get("Retry-After");
    throw new Refused(after && response.status === 429 ? `${message} (in ${after} s)` : message, response.status);
  }

  async state() {
    return (await this.ask("GET", "live/state")).json();
  }

  async run(ask, onEvent, signal) {
    const response = await this.ask("POST", "live/runs", ask, signal);
    let done = false;
    for await (const event of serverEvents(response.body)) {
      if (event.error && !event.done) throw new Refused(event.error);
      done = done || event.done === true;
      onEvent(event);
    }
    if (!done) throw new Refused(GONE);
  }

  async load(users, ask) {
    await this.ask("PUT", "live/load", {users, model: ask.model, scheduler: ask.scheduler});
  }

  async unload() {
    await this.ask("DELETE", "live/load");
  }

  async watch(onMetrics, onGone) {
    for (;;) {
      try {
        const response = await this.ask("GET", "live/metrics");
        for await (const metrics of serverEvents(response.body)) onMetrics(metrics);
        onGone(new Refused(GONE));
      } catch (error) {
        onGone(error instanceof Refused ? error : new Refused(GONE));
        if (error.status === 401) return;
      }
      await new Promise((resume) => setTimeout(resume, 3000));
    }
  }
}

// The events of a stream of `data: JSON` lines. Ends quietly where the connection breaks: who waits for more says so.
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return;
    }
    if (part.done) return;
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}

class RecordedSource {
  constructor(recording) {
    this.live = false;
    this.recording = recording;
  }

  async state() {
    return this.recording.state;
  }

  // The recorded run that was asked for; null if there is none.
  find(ask) {
    const same = (run) => RECORDED_BY.every((name) => run[name] === ask[name]);
    return this.recording.runs.find(same) ?? null;
  }

  async run(ask, onEvent) {
    const run = this.find(ask);
    if (!run) throw new Refused("This combination was not recorded. Choose another drafter, scheduler or load.");
    run.events.forEach(onEvent);
  }

  async load() {}
  async unload() {}
  async watch() {}
}

// What a recorded run is found by.
const RECORDED_BY = ["model", "scheduler", "domain", "index", "temperature", "users"];

// Seconds of a round by a measured cost table; null where nothing like it was measured. A plain round by the number of
// requests, on straight lines; one with drafts takes the time to draft more, and a time for every verified draft.
function replayedSeconds(table, event) {
  const plain = plainMilliseconds(table.plain_rounds, event.running);
  if (plain === null || event.drafted.length === 0) return plain === null ? null : plain / 1e3;
  if (event.rows > Math.max(...table.drafted_rounds.map((point) => point.rows))) return null;
  const verified = Math.max(event.rows - event.running, 0);
  return (plain + table.draft_milliseconds + table.row_milliseconds * verified) / 1e3;
}

function plainMilliseconds(points, requests) {
  if (requests <= points[0].requests) return points[0].milliseconds;
  for (let i = 1; i < points.length; i++) {
    const [low, high] = [points[i - 1], points[i]];
    if (requests > high.requests) continue;
    const share = (requests - low.requests) / (high.requests - low.requests);
    return low.milliseconds + share * (high.milliseconds - low.milliseconds);
  }
  return null;
}
