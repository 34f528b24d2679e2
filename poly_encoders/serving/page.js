// The page's own state is the dialogue's turns; everything else is asked of the service.
const at = (id) => document.getElementById(id);
const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
let turns = lines(at("first-turns").content.textContent), ranked = null, key = "", asked = 0;

document.body.classList.toggle("dark", matchMedia("(prefers-color-scheme: dark)").matches);

function say(message) {
  at("message").textContent = message;
  at("message").hidden = !message;
}

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  const found = await answer.json();
  at("locked").hidden = answer.status !== 401;
  if (!answer.ok) throw new Error(found.error?.message ?? found.error ?? answer.statusText);
  return found;
}

function showTurns() {
  at("bubbles").replaceChildren(...turns.map((text, place) => {
    const speaker = "AB"[place % 2], row = document.createElement("li");
    const name = document.createElement("b"), said = document.createElement("span");
    row.className = `pe-turn pe-turn-${speaker}`;
    name.textContent = speaker;
    said.textContent = text;
    row.append(name, said);
    return row;
  }));
  at("bubbles").scrollTop = at("bubbles").scrollHeight;
}

async function ask() {
  const mine = ++asked;
  say("");
  if (!turns.length) return say("No turn yet. Write what somebody says.");
  const body = document.body.dataset.from === "index"
    ? { turns, filter: at("filter").value.trim() || null }
    : { turns, candidates: lines(at("candidates").value) };
  try {
    const found = await post("page/answers", body);
    if (mine !== asked) return;  // a later question is under way
    ranked = { turns: [...turns], texts: found.texts, chosen: found.best, best: found.best };
    at("ranking").innerHTML = found.ranking;  // made by the service, which escapes every text
    at("note").textContent = found.note;
    at("take").hidden = false;
    await explain();
  } catch (error) {
    if (mine === asked) say(error.message);
  }
}

async function explain() {
  if (!ranked) return;
  const { turns, texts, chosen } = ranked;
  const found = await post("page/why", { turns, candidate: texts[chosen], all_vectors: at("all").checked });
  if (ranked && ranked.chosen === chosen) at("why").innerHTML = found.why;
}

function change(next) {
  turns = next;
  showTurns();
  if (turns.length) ask();
}

at("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = at("turn").value.trim();
  at("turn").value = "";
  if (said) change([...turns, said]);
});
at("undo").addEventListener("click", () => change(turns.slice(0, -1)));
at("clear").addEventListener("click", () => change([]));
at("ask").addEventListener("click", ask);
at("take").addEventListener("click", () => change([...turns, ranked.texts[ranked.best]]));
at("unlock").addEventListener("click", () => { key = at("key").value; ask(); });
at("all").addEventListener("change", () => explain().catch((error) => say(error.message)));
at("ranking").addEventListener("click", (event) => {
  const row = event.target.closest("[data-candidate]");
  if (!row || !ranked) return;
  at("ranking").querySelectorAll("[data-candidate]").forEach((other) => other.setAttribute("aria-pressed", other === row));
  ranked.chosen = row.dataset.candidate;
  explain().catch((error) => say(error.message));
});

showTurns();
ask();
