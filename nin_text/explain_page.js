"use strict";
(() => {
  const { levels, texts } = JSON.parse(document.getElementById("data").textContent);
  const sections = Array.from(document.querySelectorAll("section.text"));
  const tokens = sections.map((section) => section.querySelectorAll(".words span"));
  const shown = texts.map((text) => text.shown);
  const at = texts.map(() => -1);

  const figure = (value) => {
    const size = Math.abs(value).toFixed(2);
    return (value < 0 && Number(size) ? "\u2212" : "+") + size;
  };
  const shade = (value, scale) => {
    const level = Math.min(levels, Math.floor((levels * Math.abs(value)) / scale + 0.5));
    return level ? (value > 0 ? "f" : "a") + level : "";
  };

  // Shade the tokens of a text by their evidence for one of its classes.
  function show(text, label) {
    const { evidence, scale } = texts[text];
    shown[text] = label;
    tokens[text].forEach((token, i) => {
      const value = evidence[label][i];
      token.className = shade(value, scale);
      token.title = figure(value);
    });
    for (const part of sections[text].querySelectorAll("[data-class]"))
      part.hidden = part.dataset.class !== String(label);
    sections[text].querySelectorAll("th button").forEach((button, i) =>
      button.setAttribute("aria-pressed", String(i === label)));
    if (at[text] >= 0) tokens[text][at[text]].classList.add("at");
  }

  // Mark a token and tell its evidence for every class.
  function point(text, i) {
    if (i < 0 || i >= tokens[text].length) return;
    if (at[text] >= 0) tokens[text][at[text]].classList.remove("at");
    at[text] = i;
    tokens[text][i].classList.add("at");
    const { classes, evidence } = texts[text];
    const figures = classes.map((name, k) => name + " " + figure(evidence[k][i]));
    sections[text].querySelector(".readout").textContent =
      "\u201c\u2068" + tokens[text][i].textContent + "\u2069\u201d: " + figures.join(", ");
  }

  // #text=2&class=positive&theme=dark; without a text, the class is shown wherever it is known.
  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const number = Number(wanted.get("text")) - 1;
    texts.forEach((text, i) => {
      const label = text.classes.indexOf(wanted.get("class"));
      if (label >= 0 && (!wanted.has("text") || i === number)) show(i, label);
      sections[i].classList.toggle("chosen", i === number && texts.length > 1);
    });
    if (sections[number]) sections[number].scrollIntoView();
    if (["dark", "light"].includes(wanted.get("theme")))
      document.documentElement.dataset.theme = wanted.get("theme");
  }

  sections.forEach((section, text) => {
    section.querySelectorAll("th button").forEach((button, label) => {
      button.disabled = false;
      button.addEventListener("click", () => {
        show(text, label);
        const place = new URLSearchParams({ text: text + 1, class: texts[text].classes[label] });
        try { history.replaceState(null, "", "#" + place); } catch { /* not where it is shown */ }
      });
    });
    const words = section.querySelector(".words");
    const index = new Map(Array.from(tokens[text], (token, i) => [token, i]));
    for (const event of ["pointerover", "click"])
      words.addEventListener(event, (e) => index.has(e.target) && point(text, index.get(e.target)));
    words.addEventListener("keydown", (e) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1 };
      if (!(e.key in steps) || e.altKey || e.ctrlKey || e.metaKey) return;
      e.preventDefault();
      const turned = getComputedStyle(words).direction === "rtl" ? -1 : 1;
      point(text, at[text] < 0 ? 0 : at[text] + turned * steps[e.key]);
      tokens[text][at[text]].scrollIntoView({ block: "nearest" });
    });
  });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });
  addEventListener("hashchange", follow);
  follow();
  document.documentElement.classList.add("script");
})();
