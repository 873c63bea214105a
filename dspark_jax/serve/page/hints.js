"use strict";
// What the question marks say, and a line about every scheduler.

const HINTS = {
  model: "The small model that guesses tokens. Each kind guesses in its own way; plain decoding has none, and runs " +
    "beside the one that you choose.",
  scheduler: "The rule that says how many guesses of a round are worth checking. Whatever it says, the text keeps the " +
    "target's distribution.",
  domain: "Prompts that no drafter has seen in training. Code and arithmetic are easier to guess than free text, so " +
    "accepted lengths differ.",
  temperature: "0 takes the likeliest token each time (greedy): the answer is then the same with and without a drafter. " +
    "Above 0 tokens are drawn by chance, and guesses are accepted less often.",
  users: "Other requests that are decoded at the same time. The more there are, the more work a round is, and the less " +
    "an unsure guess is worth.",
  speed: "How fast the rounds are shown. The figures do not depend on it: they are of the clock of the machine.",
  clock: "Which clock counts: that of the machine on which this was decoded, or step times measured on an accelerator. " +
    "Replaying changes times only, never tokens.",
  tau: "Tokens that a round gives on average: the accepted guesses, and one of the target's own. Plain decoding has 1. " +
    "The lower part of a bar is accepted guesses, what is on top of it is the target's own token.",
  rate: "Tokens since the first one, over the time since then. The solid line is with the drafter, the dashed one is " +
    "plain decoding.",
  budget: "How many tokens the target checks for a request in a round, the one it goes on from included. Bars are this " +
    "request, the line is the mean of all that are decoded together.",
};

const SCHEDULERS = {
  fixed: "Every guess is verified.",
  threshold: "Guesses are verified up to the first one whose confidence is below one half.",
  early_stop: "The paper's Algorithm 1: guesses of all users, surest first, as long as the next one still pays.",
  lagged: "The batch's size follows from confidences two rounds old; the surest guesses of now fill it.",
  adaptive: "Rounds draft only where that is expected to pay; the others are plain decoding.",
};

// Shows a hint beside its button on hover, focus or a tap; Escape hides it.
function connectHints() {
  const tip = byId("tip");
  let owner = null;
  const hide = () => {
    tip.hidden = true;
    owner?.removeAttribute("aria-describedby");
    owner = null;
  };
  const show = (button) => {
    hide();
    owner = button;
    tip.textContent = HINTS[button.dataset.hint];
    tip.hidden = false;
    button.setAttribute("aria-describedby", "tip");
    const at = button.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    tip.style.left = `${Math.max(left, 12) + scrollX}px`;
    tip.style.top = `${at.bottom + 8 + scrollY}px`;
  };
  for (const button of document.querySelectorAll(".hint")) {
    button.setAttribute("aria-label", `About ${hintTitle(button)}`);
    for (const event of ["mouseenter", "focus", "click"]) button.addEventListener(event, () => show(button));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, hide);
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

const hintTitle = (button) => (button.parentElement.querySelector("label") ?? button.parentElement.firstChild).textContent;
