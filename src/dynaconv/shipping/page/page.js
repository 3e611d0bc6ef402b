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

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function image(png, words) {
  const element = make("img");
  element.src = `data:image/png;base64,${png}`;
  element.alt = words;
  return element;
}

async function openGallery() {
  try {
    const { samples } = await ask("v1/gallery");
    at("gallery").hidden = samples.length === 0;
    at("samples").replaceChildren(...samples.map(({ png, label }, place) => {
      const button = make("button");
      button.type = "button";
      button.append(image(png, `Test picture ${place + 1}`)); // its class would give the answer away
      button.addEventListener("click", () => {
        const bytes = Uint8Array.from(atob(png), (each) => each.charCodeAt(0));
        classify(new Blob([bytes], { type: "image/png" }), label);
      });
      return button;
    }));
  } catch {
    at("gallery").hidden = true; // it is an extra: introduce() tells what is wrong
  }
}

function say(text, isProblem = false) {
  at("status").textContent = text;
  at("status").classList.toggle("problem", isProblem);
}

async function classify(picture, truth = null) {
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
    if (number === latest) show(answer.predictions[0], picture, truth);
  } catch (error) {
    if (number === latest) say(error.message, true);
  }
}

function showNearest(nearest) {
  at("nearest").hidden = nearest.length === 0;
  at("neighbours").replaceChildren(...nearest.map(({ label, cosine, png }) => {
    const row = make("li");
    row.append(image(png, ""), label, " ", make("span", "", `${Math.round(100 * cosine)}% alike`));
    return row;
  }));
}

function showMixture(blocks) {
  at("mixture").hidden = blocks.length === 0;
  const all = blocks.flatMap(({ weights }) => weights);
  const [low, high] = [Math.min(0, ...all), Math.max(1e-9, ...all)];
  const share = (value) => `${(100 * (value - low)) / (high - low)}%`;
  at("weights").replaceChildren(...blocks.flatMap(({ block, kernel_sizes: sides, weights }) =>
    weights.map((weight, k) => {
      const row = make("tr", k === 0 ? "first" : "");
      if (k === 0) {
        const head = make("th", "", block);
        head.scope = "rowgroup";
        head.rowSpan = weights.length;
        row.append(head);
      }
      const cell = make("td", "weight");
      const scale = make("div", weight < 0 ? "scale below" : "scale");
      const bar = make("i");
      bar.style.setProperty("--from", share(Math.min(0, weight)));
      bar.style.setProperty("--to", share(Math.max(0, weight)));
      scale.append(bar, make("b", "", weight.toFixed(2)));
      cell.append(scale);
      row.append(make("td", "", `${sides[k]} × ${sides[k]}`), cell);
      return row;
    })));
}

function show(found, picture, truth) {
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
  at("heat-figure").hidden = !found.heat;
  if (found.heat) at("heat").src = `data:image/png;base64,${found.heat}`;
  at("truth").hidden = truth === null;
  at("truth").textContent = truth === found.label ? `Right: it is ${truth}.` : `Wrong: it is ${truth}.`;
  showNearest(found.nearest || []);
  showMixture(found.mixture || []);
  at("seen-as").textContent = `what the network sees: ${model.image_size} × ${model.image_size} pixels`;
  at("classes").replaceChildren(...found.top.map(({ label, probability }) => {
    const row = make("li");
    const [name, value] = [make("span", "name", label), make("span", "value", percent(probability))];
    const bar = make("progress");
    bar.max = 1;
    bar.value = probability;
    bar.setAttribute("aria-hidden", "true");
    row.append(name, bar, value);
    return row;
  }));
  at("notes").replaceChildren(...found.notes.map((note) => make("li", "", note)));
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
at("token").addEventListener("change", () => {
  introduce();
  openGallery();
});
introduce();
openGallery();
