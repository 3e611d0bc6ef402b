"use strict";

const at = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)}%`;
let model = null;
let latest = 0; // the number of the last picture: answers to earlier ones come too late

function authorization() {
  const token = at("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...authorization(), ...options.headers } });
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) at("token-line").hidden = false;
  if (!response.ok) throw new Error(answer.detail || `The server answered ${response.status}.`);
  return answer;
}

async function introduce() {
  try {
    model = await ask("v1/model");
    at("about").textContent = `It knows ${model.classes.length} classes: ${model.classes.join(", ")}.`;
  } catch (error) {
    at("about").textContent = error.message;
  }
}

function say(text, isProblem = false) {
  at("status").textContent = text;
  at("status").classList.toggle("problem", isProblem);
}

async function classify(picture) {
  if (!picture) return;
  const number = ++latest;
  say("Looking…");
  at("result").hidden = true;
  try {
    if (!model) await introduce();
    const answer = await ask("v1/predict?top=10&detail=1", {
      method: "POST",
      headers: { "Content-Type": picture.type.startsWith("image/") ? picture.type : "application/octet-stream" },
      body: picture,
    });
    if (number === latest) show(answer.predictions[0], picture);
  } catch (error) {
    if (number === latest) say(error.message, true);
  }
}

function show(found, picture) {
  say("");
  at("verdict").textContent = `${found.label}, ${percent(found.confidence)}`;
  at("abstain").hidden = !found.abstains;
  if (found.abstains) {
    at("abstain").querySelector("span").textContent =
      `Below ${percent(model.threshold)} it should not be relied upon.`;
  }
  URL.revokeObjectURL(at("given").src);
  at("given").src = URL.createObjectURL(picture);
  at("seen").src = `data:image/png;base64,${found.seen}`;
  at("seen-as").textContent = `what the network sees: ${model.image_size} × ${model.image_size} pixels`;
  at("classes").replaceChildren(...found.top.map(({ label, probability }) => {
    const row = document.createElement("li");
    const [name, value] = ["name", "value"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    name.textContent = label;
    value.textContent = percent(probability);
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = probability;
    bar.setAttribute("aria-hidden", "true");
    row.append(name, bar, value);
    return row;
  }));
  at("notes").replaceChildren(...found.notes.map((note) => {
    const row = document.createElement("li");
    row.textContent = note;
    return row;
  }));
  at("result").hidden = false;
  at("verdict").focus();
}

const drop = at("drop");
at("ask").addEventListener("submit", (event) => event.preventDefault());
at("file").addEventListener("change", (event) => {
  classify(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") classify(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => classify(event.clipboardData.files[0]));
at("token").addEventListener("change", introduce);
introduce();
