"use strict";
// The page: its controls, and what they do.

const OWN = "own";
const LOAD_SECONDS = 10; // the server drops background users that nobody asks for again within 30

const recording = JSON.parse(byId("recording").textContent || "null");
const source = recording ? new RecordedSource(recording) : new LiveSource();
const player = new Player(() => redraw());
let state = null;
let stopper = null; // of the run in progress
let asked = null; // what the shown run was asked for
let drawn = ""; // what is drawn now
let load = {users: 0, ask: null};

const control = Object.fromEntries(
  ["model", "scheduler", "domain", "index", "prompt", "temperature", "users", "tokens", "seed", "speed", "clock"].map(
    (name) => [name, byId(name)],
  ),
);

function showError(error) {
  byId("error").textContent = error ? error.message : "";
  byId("error").hidden = !error;
  if (error?.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

const say = (text) => (byId("status").textContent = text);

function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(({value, text, disabled}) => {
      const option = make("option", "", text);
      Object.assign(option, {value, disabled: disabled ?? false});
      return option;
    }),
  );
  const wanted = options.find((option) => option.value === chosen && !option.disabled);
  const first = wanted ?? options.find((option) => !option.disabled);
  if (first) select.value = first.value;
}

// What there is to choose from.

const modelOf = (name) => state.models.find((model) => model.name === name);
const drafters = () => state.models.filter((model) => model.block_size > 0);

function recorded(more = {}) {
  return state.live || recording.runs.some((run) => Object.entries(more).every(([name, value]) => run[name] === value));
}

function setUp() {
  state.live = source.live;
  const models = drafters().length ? drafters() : state.models;
  fill(control.model, models.map(({name}) => ({value: name, text: name})), state.default);
  const domains = Object.keys(state.domains).map((name) => ({value: name, text: name}));
  if (source.live) domains.push({value: OWN, text: "your own text"});
  fill(control.domain, domains, domains[0]?.value);
  const clocks = state.costs.map((table, number) => ({value: String(number), text: table.name}));
  fill(control.clock, [{value: "", text: `no: times of this run (${state.device})`}, ...clocks], "");
  Object.assign(control.tokens, {max: state.limits.max_tokens, value: Math.min(96, state.limits.max_tokens)});
  for (const name of ["tokens", "seed"]) control[name].disabled = !source.live;
  const users = source.live ? range(state.limits.users + 1) : state.users;
  Object.assign(control.users, {min: 0, max: users.length - 1, value: 0});
  control.users.choices = users;
  const temperatures = source.live ? range(16).map((step) => step / 10) : state.temperatures;
  Object.assign(control.temperature, {min: 0, step: 1, max: temperatures.length - 1, value: 0});
  control.temperature.choices = temperatures;
  for (const name of ["users", "temperature"]) control[name].disabled = control[name].choices.length < 2;
  byId("server").hidden = !source.live;
  byId("source").hidden = source.live;
  if (!source.live) byId("source").textContent = recording.about;
  chooseModel();
  chooseDomain();
  describe();
}

const range = (count) => [...Array(count).keys()];
const chosen = (name) => control[name].choices[Number(control[name].value)];

function chooseModel() {
  const model = modelOf(control.model.value);
  const usable = state.schedulers.filter((name) => model.schedulers.includes(name));
  const options = state.schedulers.map((name) => ({
    value: name,
    text: name.replace("_", " "),
    disabled: !usable.includes(name) || !recorded({model: model.name, scheduler: name}),
  }));
  fill(control.scheduler, options, control.scheduler.value || state.scheduler);
}

function chooseDomain() {
  const own = control.domain.value === OWN;
  const prompts = own ? [] : state.domains[control.domain.value];
  const options = prompts.map((text, number) => ({value: String(number), text: `${number + 1}: ${shortened(text)}`}));
  fill(control.index, options, "0");
  control.index.disabled = own;
  choosePrompt();
  if (own) control.prompt.focus();
}

function choosePrompt() {
  const own = control.domain.value === OWN;
  control.prompt.readOnly = !own;
  if (own) control.prompt.value = "";
  else control.prompt.value = state.domains[control.domain.value][Number(control.index.value)];
}

const shortened = (text) => (text.length > 60 ? `${text.slice(0, 57)}…` : text).replaceAll("\n", " ");

function describe() {
  const model = modelOf(control.model.value);
  const block = model.block_size ? `; up to ${count(model.block_size, "token")} a round` : "";
  byId("model-note").textContent = `${model.kind}: ${model.about}${block}`;
  const needs = model.confident ? "" : " Rules that read confidences are not for this drafter, which gives none.";
  byId("scheduler-note").textContent = (SCHEDULERS[control.scheduler.value] ?? "") + needs;
  const heat = chosen("temperature");
  byId("temperature-value").textContent = heat ? heat.toFixed(1) : "0 (greedy)";
  control.temperature.setAttribute("aria-valuetext", byId("temperature-value").textContent);
  const users = chosen("users");
  byId("users-value").textContent = users;
  const full = users + 1 > state.slots;
  byId("users-note").textContent = full ? `${state.slots} requests are decoded at a time; the others wait.` : "";
  control.users.setAttribute("aria-valuetext", byId("users-value").textContent);
  player.speed = SPEEDS[Number(control.speed.value)];
  byId("speed-value").textContent = player.speed.text;
  control.speed.setAttribute("aria-valuetext", player.speed.text);
  describeClock();
}

function describeClock() {
  const table = control.clock.value === "" ? null : state.costs[Number(control.clock.value)];
  player.table = table;
  byId("clock-note").hidden = !table;
  if (!table) return;
  byId("clock-text").textContent = `Replayed: every round takes the time that was measured on ${table.name}. Tokens, ` +
    "accepted lengths and budgets are still those of this run and its drafter.";
  byId("clock-source").textContent = `${table.source} ${table.limits}`;
}

// Running.

function question() {
  const own = control.domain.value === OWN;
  const prompt = own ? {prompt: control.prompt.value} : {domain: control.domain.value, index: Number(control.index.value)};
  return {
    model: control.model.value,
    scheduler: control.scheduler.value,
    temperature: chosen("temperature"),
    max_tokens: Number(control.tokens.value),
    seed: Number(control.seed.value),
    ...prompt,
  };
}

async function go() {
  stopper?.abort();
  const own = new AbortController();
  stopper = own;
  showError(null);
  player.clear();
  asked = {...question(), users: chosen("users")};
  const plain = {...asked, model: state.plain, scheduler: "fixed"};
  player.comparing = asked.model !== state.plain;
  byId("go").disabled = source.live;
  byId("stop").disabled = !source.live;
  player.play();
  try {
    await decode(asked, player.drafted, own.signal, "Decoding");
    // One after the other, under the same load, so that neither slows the other down.
    if (player.comparing) await decode(plain, player.plain, own.signal, "Now the same without a drafter");
    say("");
  } catch (error) {
    if (own !== stopper) return;
    if (error.name === "AbortError") say("Stopped.");
    else if (!(error instanceof Refused)) throw error;
    else {
      say("");
      showError(error);
      byId("go").focus(); // it was disabled, and nothing else has the focus
    }
    endLanes();
  } finally {
    if (own === stopper) {
      stopper = null;
      byId("go").disabled = false;
      byId("stop").disabled = true;
      await setLoad(0, null).catch(() => {}); // what comes next shows whether the server is there
    }
  }
  redraw();
}

// Scrolls to the rounds where they begin below the window's end, as on a phone.
function bringIntoView() {
  if (byId("stage").getBoundingClientRect().top + 200 < innerHeight) return;
  byId("player").scrollIntoView({behavior: player.calm.matches ? "auto" : "smooth", block: "start"});
}

async function decode(ask, lane, signal, what) {
  await setLoad(ask.users, ask);
  const {users, ...body} = source.live ? ask : {...ask};
  say(`${what}…`);
  await source.run(source.live ? body : ask, (event) => {
    if (event.preparing) say(`${event.preparing}…`);
    else if (lane.events.length === 0) say(`${what}…`);
    lane.take(event);
    redraw();
    if (event.done && event.finish_reason === "error") throw new Refused(event.error);
  }, signal);
}

// A run that was broken off ends with what there is.
function endLanes() {
  for (const lane of [player.drafted, player.plain]) lane.done ??= {done: true, finish_reason: "cancelled"};
  player.comparing = player.comparing && player.plain.events.length > 0;
}

async function setLoad(users, ask) {
  if (!users && !load.users) return;
  load = {users, ask};
  if (users) await source.load(users, ask);
  else await source.unload();
}

function keepLoad() {
  if (load.users) source.load(load.users, load.ask).catch(showError);
}

// Drawing what the player shows.

function redraw() {
  const {drafted, plain, position, committed, phase, plainLast} = player;
  const key = [position, player.seen, committed, phase, plainLast, player.playing, player.over, player.comparing, drafted.events.length,
    drafted.complete, plain.events.length, plain.complete, control.clock.value].join();
  if (key === drawn) return;
  drawn = key;
  drawButtons();
  drawStage(position, phase);
  drawText(byId("drafted-text"), drafted.events, committed);
  drawText(byId("plain-text"), plain.events, plainLast);
  drawRounds(byId("rounds"), drafted.events, player.seen, position, (at) => player.show(at));
  drawFigures(committed, plainLast);
  byId("verdict").textContent = player.over && drafted.events.length ? verdict() : "";
}

function drawButtons() {
  const any = player.drafted.events.length > 0;
  const end = player.drafted.complete && player.atEnd;
  byId("again").disabled = !any;
  byId("back").disabled = player.position < 1;
  byId("step").disabled = !any || player.over;
  byId("pause").disabled = !any || (player.over && !player.playing);
  byId("pause").textContent = player.playing ? "Pause" : end ? "Go on" : player.position < 0 ? "Play" : "Go on";
}

function drawStage(position, phase) {
  const events = player.drafted.events;
  const event = events[position];
  byId("story").setAttribute("aria-live", player.playing ? "off" : "polite");
  if (!event) {
    byId("stage-title").textContent = asked ? "Waiting for the first token" : "No round yet";
    byId("block").replaceChildren();
    byId("gain").textContent = "";
    byId("story").textContent = asked ? "The target reads the prompt." : "Choose a drafter and a prompt, and press Go.";
    return;
  }
  const all = player.drafted.complete ? ` of ${events.length - 1}` : "";
  byId("stage-title").textContent = event.round === 0 ? "Before the first round" : `Round ${event.round}${all}`;
  const seconds = player.seconds(event);
  const took = seconds === null ? "not measured for so many rows" : `${number(1e3 * seconds, 1)} ms${player.table ? ", replayed" : ""}`;
  const among = event.running > 1 ? `, ${event.running} requests together` : "";
  byId("gain").textContent = event.round === 0 ? "" : `${count(event.rows, "row")} of the target${among}, ${took}`;
  drawBlock(byId("block"), event, events[position - 1]?.next?.text ?? "", phase);
  byId("story").textContent = story(event, phase);
}

function drawFigures(committed, plainLast) {
  const {drafted, plain, seconds} = player;
  const own = drafted.totals(committed, seconds);
  const other = plain.totals(plainLast, seconds);
  drawLane("drafted", drafted, own, player.over);
  drawLane("plain", plain, other, player.over);
  const rounds = drafted.events.slice(1, committed + 1);
  const total = Math.max(drafted.events.length - 1, 1);
  const most = (modelOf(asked?.model ?? control.model.value)?.block_size ?? 0) + 1;
  drawTau(byId("tau-chart"), rounds, total, most, own.tau);
  byId("tau").textContent = number(own.tau, 2);
  const lines = [
    {name: "drafted-line", label: "with the drafter", points: ratePoints(drafted, committed, seconds)},
    {name: "plain-line", label: "plain", points: ratePoints(plain, plainLast, seconds)},
  ];
  const end = Math.max(...[drafted, plain].map((lane) => lane.totals(lane.events.length - 1, seconds).time ?? 0));
  drawRates(byId("rate-chart"), lines, end);
  byId("rate").textContent = number(own.rate, own.rate < 100 ? 1 : 0);
  byId("rate-note").textContent = other.rate ? `plain ${number(other.rate, other.rate < 100 ? 1 : 0)}` : "";
  byId("budget").textContent = number(drawBudget(byId("budget-chart"), rounds, total, most), 2);
}

function drawLane(name, lane, totals, over) {
  const any = totals.tokens > 0;
  byId(`${name}-tokens`).textContent = any ? totals.tokens : "–";
  byId(`${name}-passes`).textContent = any ? totals.rounds : "–";
  byId(`${name}-speed`).textContent = number(totals.rate, totals.rate < 100 ? 1 : 0);
  const most = lane.complete ? lane.events.reduce((sum, event) => sum + event.committed, 0) : (asked?.max_tokens ?? 1);
  byId(`${name}-progress`).value = over && lane.complete ? 1 : totals.tokens / Math.max(most, 1);
}

// The whole comparison in a few words.
function verdict() {
  const {drafted, plain, seconds} = player;
  const own = drafted.totals(drafted.events.length - 1, seconds);
  const tau = `${number(own.tau, 2)} tokens per round`;
  if (!player.comparing) return own.rounds ? `${count(own.tokens, "token")} in ${count(own.rounds, "round")}.` : "";
  const other = plain.totals(plain.events.length - 1, seconds);
  const passes = `${tau}: ${count(own.rounds, "pass", "passes")} of the target instead of ${other.rounds}.`;
  const here = source.live ? "On this machine" : "Where it was recorded";
  const where = player.table ? `On ${player.table.name}` : here;
  const faster = own.rate && other.rate ? ` ${where}: ${number(own.rate / other.rate, 2)} times the speed.` : "";
  const same = text(drafted) === text(plain);
  if (asked.temperature > 0) return `${passes}${faster} The texts differ: each is a draw from the same distribution.`;
  return `${passes}${faster} ${same ? "Both texts are the same." : "The texts differ."}`;
}

const text = (lane) => lane.events.map((event) => event.text).join("") + (lane.done?.text ?? "");

function drawServer(metrics) {
  byId("server-users").textContent = metrics.users;
  byId("server-slots").textContent = `${metrics.running} / ${metrics.slots}`;
  byId("server-queue").textContent = metrics.queue;
  byId("server-rate").textContent = number(metrics.tokens_per_second);
  byId("server-tau").textContent = number(metrics.accepted_length, 2);
  byId("server-budget").textContent = number(metrics.budget, 2);
}

// Connecting.

function connect() {
  byId("setup").addEventListener("submit", (event) => {
    event.preventDefault();
    go();
    bringIntoView();
  });
  byId("stop").addEventListener("click", () => {
    stopper?.abort();
    byId("go").disabled = false;
    byId("go").focus();
  });
  byId("pause").addEventListener("click", () => (player.playing ? player.pause() : player.play()));
  byId("step").addEventListener("click", () => player.step());
  byId("back").addEventListener("click", () => player.show(player.position - 1));
  byId("again").addEventListener("click", () => {
    player.rewind();
    player.play();
  });
  control.model.addEventListener("change", chooseModel);
  control.domain.addEventListener("change", chooseDomain);
  control.index.addEventListener("change", choosePrompt);
  for (const one of Object.values(control)) one.addEventListener("input", describe);
  control.clock.addEventListener("change", redraw);
  byId("theme").addEventListener("change", (event) => (document.documentElement.dataset.theme = event.target.value));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    source.key = byId("key").value;
    byId("key-form").hidden = true;
    start();
  });
  addEventListener("resize", () => {
    drawn = "";
    redraw();
  });
  setInterval(keepLoad, LOAD_SECONDS * 1e3);
  connectHints();
}

async function start() {
  try {
    state = await source.state();
    showError(null);
    setUp();
    redraw();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    showError(error);
    if (error.status !== 401) setTimeout(start, 3000);
    return;
  }
  if (!source.live) go();
  source.watch((metrics) => {
    if (byId("error").textContent === GONE) showError(null);
    drawServer(metrics);
  }, showError);
}

connect();
start();
