"use strict";
// The controls of the images, the zoom and the copy button. Without this script, all images and tables are shown.
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // ---- the command

  const copy = byId("copy");
  if (copy) {
    copy.addEventListener("click", async () => {
      const text = byId("command").textContent;
      try {
        await navigator.clipboard.writeText(text);
        byId("copied").textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(byId("command"));
        byId("copied").textContent = "Selected: press Ctrl+C";
      }
    });
  }

  // ---- which images are shown

  const FIRST = 12;
  const cards = all(".card");
  if (!cards.length) return;
  const samplers = all("#reference option").map((option) => ({
    line: option.dataset.line,
    steps: Number(option.dataset.steps),
    calls: Number(option.dataset.calls),
  }));
  const texts = new Map(cards.map((card) => [card, card.querySelector("bdi").textContent.toLowerCase()]));
  const amount = byId("amount");
  let limit = FIRST;
  let amounts = [];

  const setAmounts = () => {
    const axis = byId("axis").value;
    amounts = [...new Set(samplers.map((one) => one[axis]).filter(Boolean))].sort((a, b) => a - b);
    amount.max = Math.max(0, amounts.length - 1);
    const four = amounts.findLastIndex((value) => value <= 4);
    amount.value = Math.max(0, four);
    amount.closest("p").hidden = amounts.length < 2;
  };

  // The sampler of a line with the largest number of steps (or calls) up to the slider's, or else its smallest.
  const chosen = (line) => {
    const axis = byId("axis").value, most = amounts[Number(amount.value)] ?? Infinity;
    const known = samplers.map((one, index) => ({ ...one, index })).filter((one) => one.line === line);
    known.sort((a, b) => a[axis] - b[axis]);
    return (known.findLast((one) => one[axis] <= most) ?? known[0]).index;
  };

  const update = () => {
    const axis = byId("axis").value, value = amounts[Number(amount.value)];
    const words = axis === "steps" ? ["step", "steps"] : ["network call", "network calls"];
    byId("shown").textContent = value ? `${value} ${words[value === 1 ? 0 : 1]}` : "";
    amount.setAttribute("aria-valuetext", byId("shown").textContent);
    const reference = Number(byId("reference").value);
    const visible = new Set([reference, ...all("input[name=line]:checked").map((box) => chosen(box.value))]);
    for (const shot of all(".shot")) {
      const index = Number(shot.dataset.sampler);
      shot.hidden = !visible.has(index);
      shot.classList.toggle("reference", index === reference);
    }
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = cards.filter((card) => texts.get(card).includes(wanted));
    const shown = new Set(found.slice(0, limit));
    for (const card of cards) card.hidden = !shown.has(card);
    byId("more").parentElement.hidden = shown.size === found.length;
    byId("count").textContent = wanted
      ? `${found.length} of ${cards.length} prompts contain this text; ${shown.size} are shown.`
      : `${shown.size} of ${cards.length} prompts are shown.`;
  };

  document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
  byId("axis").addEventListener("change", () => { setAmounts(); update(); });
  byId("reference").addEventListener("change", update);
  byId("filter").addEventListener("input", () => { limit = FIRST; update(); });
  amount.addEventListener("input", update);
  for (const box of all("input[name=line]")) box.addEventListener("change", update);
  byId("more").addEventListener("click", () => {
    const next = cards.filter((card) => card.hidden)[0];
    limit += 2 * FIRST;
    update();
    const button = next?.querySelector(".shot:not([hidden]) button");
    if (button && !next.hidden) button.focus({ preventScroll: true });
  });

  // ---- zoom: a modal dialog keeps the focus inside, and Escape closes it

  const zoom = byId("zoom");
  let opener = null;
  const open = (button) => {
    const image = button.querySelector("img"), target = byId("zoom-image");
    opener = button;
    target.src = image.src;
    target.alt = image.alt;
    target.classList.toggle("tiny", image.classList.contains("tiny"));
    byId("zoom-prompt").textContent = button.closest(".card").querySelector("bdi").textContent;
    byId("zoom-sampler").textContent = button.nextElementSibling.textContent;
    if (!zoom.open) zoom.showModal();
  };
  const move = (by) => {
    const shown = all(".card:not([hidden])").flatMap((card) => {
      const some = all(".shot:not([hidden])", card);
      some.sort((a, b) => b.classList.contains("reference") - a.classList.contains("reference"));
      return some.map((shot) => shot.querySelector("button"));
    });
    const at = shown.indexOf(opener);
    open(shown[(at + by + shown.length) % shown.length]);
  };
  for (const card of cards) {
    card.addEventListener("click", (event) => {
      const button = event.target.closest(".shot button");
      if (button) open(button);
    });
  }
  byId("before").addEventListener("click", () => move(-1));
  byId("after").addEventListener("click", () => move(1));
  byId("close").addEventListener("click", () => zoom.close());
  zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
  zoom.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      move(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  zoom.addEventListener("close", () => opener?.focus());

  setAmounts();
  update();
})();
