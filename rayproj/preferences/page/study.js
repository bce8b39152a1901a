"use strict";
// What is shown is what the server says, and the server alone knows what was rated: a reload or another tab shows the same.
const $ = (id) => document.getElementById(id);
const NAMES = { left: "Left image", right: "Right image", only: "Image" };
let task = null, shownAt = 0, busy = true;

function show(id) {
  for (const section of ["signin", "rating", "done"]) $(section).hidden = section !== id;
}

function wait(on) {
  busy = on;
  // And not disabled, which would take the focus from who uses keys.
  for (const button of document.querySelectorAll("#choices button, #number-form button")) button.ariaDisabled = on ? "true" : null;
}

// An answer that the server may have missed is sent again until it is heard of; the server counts it once.
async function call(method, path, body) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
    try {
      const options = { method, credentials: "same-origin", cache: "no-store" };
      if (body) Object.assign(options, { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      const answer = await fetch(path, options);
      if (answer.status < 500) return answer;
    } catch (error) { /* no connection */ }
    $("status").textContent = "The server does not answer; trying again. Nothing is lost.";
    await new Promise((go) => setTimeout(go, pause));
  }
}

function picture(side, name) {
  const figure = document.createElement("figure"), button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  button.className = "picture";
  button.setAttribute("aria-label", "Enlarge: " + name.toLowerCase());
  image.alt = name;
  image.src = "api/task/" + task.id + "/" + side;
  image.draggable = false;
  button.append(image);
  figure.append(button);
  return figure;
}

async function display(answer) {
  if (answer.status === 401) {
    task = null;
    show("signin");
    $("status").textContent = "";
    $("token").focus();
    return;
  }
  if (!answer.ok) {
    $("status").textContent = "That was not accepted; please reload the page.";
    return;
  }
  const state = await answer.json();
  $("count").textContent = state.done + " of " + state.total;
  $("bar").max = state.total;
  $("bar").value = state.done;
  task = state.task;
  $("status").textContent = "";
  if (!task) {
    show("done");
    $("done-title").focus();
    return;
  }
  $("question").textContent = task.text;
  $("prompt").hidden = !task.prompt;
  $("prompt").textContent = task.prompt || "";
  $("images").replaceChildren(...task.images.map((side) => picture(side, NAMES[side])));
  $("images").classList.toggle("single", task.images.length === 1);
  $("reference").hidden = !task.reference;
  if (task.reference) $("reference").replaceChildren(...picture("reference", "Reference photo").children, caption());
  const counts = task.images.length === 1;
  $("choices").hidden = counts;
  $("number-form").hidden = !counts;
  $("number").value = "";
  $("keys").hidden = counts;
  show("rating");
  $("question").focus({ preventScroll: true });
  const current = task;
  try {
    await Promise.all([...document.querySelectorAll("#rating figure:not([hidden]) img")].map((image) => image.decode()));
  } catch (error) {
    if (current === task) $("status").textContent = "An image did not come; please reload the page.";
    return;
  }
  if (current !== task) return;
  shownAt = performance.now();
  wait(false);
  if (counts) $("number").focus({ preventScroll: true });
}

function caption() {
  const text = document.createElement("figcaption");
  text.textContent = "Reference photo";
  return text;
}

async function rate(answer) {
  if (busy || !task) return;
  wait(true);
  const seconds = Math.min(86400, (performance.now() - shownAt) / 1000);
  await display(await call("POST", "api/rating", { task: task.id, answer, seconds }));
}

async function load() {
  wait(true);
  await display(await call("GET", "api/task"));
}

async function signIn(token) {
  const answer = await call("POST", "api/session", { token: token.trim() });
  if (answer.ok) return load();
  show("signin");
  $("status").textContent = "This token is not known; please check it.";
  $("token").focus();
}

$("signin-form").addEventListener("submit", (event) => { event.preventDefault(); signIn($("token").value); });
$("number-form").addEventListener("submit", (event) => { event.preventDefault(); rate(Number($("number").value)); });
$("choices").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) rate(button.dataset.answer);
});
document.addEventListener("keydown", (event) => {
  if (!$("shortcuts").checked || event.repeat || event.ctrlKey || event.altKey || event.metaKey || $("choices").hidden || $("large").open) return;
  // Not by the arrow down, which scrolls to what a small screen does not show.
  const answer = { 1: "left", 2: "indifferent", 3: "right", ArrowLeft: "left", ArrowRight: "right" }[event.key];
  if (!answer) return;
  event.preventDefault();
  rate(answer);
});
function shortcuts() {
  for (const button of $("choices").children) {
    if ($("shortcuts").checked) button.setAttribute("aria-keyshortcuts", button.dataset.keys);
    else button.removeAttribute("aria-keyshortcuts");
  }
}
$("shortcuts").checked = localStorage.getItem("shortcuts") !== "off";
$("shortcuts").addEventListener("change", () => {
  localStorage.setItem("shortcuts", $("shortcuts").checked ? "on" : "off");
  shortcuts();
});
shortcuts();
$("large").addEventListener("click", () => $("large").close());
$("rating").addEventListener("click", (event) => {
  const button = event.target.closest(".picture");
  if (!button) return;
  const image = button.querySelector("img"), large = $("large").querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  $("large").showModal();
});
window.addEventListener("pageshow", (event) => { if (event.persisted) load(); });

// A link may bring the token behind "#", which browsers send to no server.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  history.replaceState(null, "", location.pathname);
  signIn(given);
} else load();
