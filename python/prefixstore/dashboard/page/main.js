// Asks the server in turn, one question a second, and hands the answers to the parts of the page.

import { byId, setFigure, setText } from "./draw.js";
import { FirstTokenView } from "./first_token.js";
import { amount, count, percent, plural, rate, seconds } from "./format.js";
import { HistoryView } from "./history.js";
import { sum } from "./places.js";
import { showMisses, showPlanner } from "./reasons.js";
import { RequestsView } from "./requests.js";
import { showTiers } from "./tiers.js";
import { TreeView } from "./tree.js";

const INTERVAL_MS = 1000;
const RETRY_MS = 5000;
const TIMEOUT_MS = 8000;
const OLD_S = 10; // a sample of this age is worth a warning
const FIRST = ["overview", "requests", "history", "tree"];
const TURNS = ["overview", "requests", "overview", "history", "overview", "tree"];

const historyView = new HistoryView();
const firstTokenView = new FirstTokenView();
const treeView = new TreeView();
const requestsView = new RequestsView();

const handlers = {
  overview: showOverview,
  history: (answer) => {
    historyView.update(answer);
    const output = historyView.outputRate();
    setFigure("tile-output", output === null ? "–" : `${rate(output)} tokens/s`);
  },
  requests: (answer) => {
    firstTokenView.update(answer.first_token);
    requestsView.update(answer);
  },
  tree: (answer) => treeView.update(answer),
};

let isPaused = false;
let answeredAt = null;

function showOverview(overview) {
  setText("about", `${overview.model} · up to ${amount(overview.max_model_len)} tokens`);
  document.title = `${overview.model} – kvkernels`;
  const hits = sum(overview.hit_tokens);
  const all = overview.prompt_tokens;
  setFigure("tile-reused", all > 0 ? percent(hits / all) : "–");
  setText("tile-reused-note", all > 0 ? `${amount(hits)} of ${plural(all, "token")} since the start` : "no prompt yet");
  setText("tile-running", count(overview.num_running));
  setText("tile-running-note", `of ${count(overview.max_running)} at once`);
  setText("tile-queued", count(overview.num_queued));
  setText("tile-queued-note", `of ${count(overview.max_queued)}; ${count(overview.num_refused)} refused`);
  showTiers(overview);
  showMisses(overview);
  showPlanner(overview);
  showState("live", overview.age_s > OLD_S
    ? `The server answers, but the engine's counters are ${seconds(overview.age_s)} old: look at its log.` : null);
}

function showState(state, banner) {
  byId("state").dataset.state = state;
  setText("state", state);
  byId("banner").hidden = banner === null;
  if (banner !== null) setText("banner", banner);
  document.body.classList.toggle("is-stale", state === "no answer");
}

async function ask(question) {
  const answer = await fetch(`dashboard/${question}`, { signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  handlers[question](await answer.json());
  answeredAt = new Date();
}

async function askAndShow(question) {
  try {
    await ask(question);
    return true;
  } catch (error) {
    const since = answeredAt === null ? "" : ` The figures are of ${answeredAt.toLocaleTimeString("en-GB")}.`;
    showState("no answer", `No answer from the server (${error.message}). Trying again every ${RETRY_MS / 1000} s.${since}`);
    return false;
  }
}

function wait(duration_ms) {
  return new Promise((resolve) => setTimeout(resolve, duration_ms));
}

async function run() {
  let turns = [...FIRST];
  let isFirst = true;
  while (true) {
    if (isPaused || document.hidden) {
      await wait(INTERVAL_MS / 4);
      continue;
    }
    if (turns.length === 0) {
      turns = [...TURNS];
      isFirst = false;
    }
    if (await askAndShow(turns[0])) {
      turns.shift();
      if (!isFirst) await wait(INTERVAL_MS);
    } else {
      // After a silence everything is asked at once again.
      turns = [...FIRST];
      isFirst = true;
      await wait(RETRY_MS);
    }
  }
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  setText("pause", isPaused ? "Go on" : "Pause");
  if (byId("state").dataset.state !== "no answer") showState(isPaused ? "paused" : "live", null);
});

run();
