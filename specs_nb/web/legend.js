// A click on a name of a legend hides that name's marks, or shows them again.
for (const figure of document.querySelectorAll("figure")) {
  const marks = name => [...figure.querySelectorAll("[data-of]")].filter(mark => mark.dataset.of === name);
  const keys = [...figure.querySelectorAll("[data-key]")];
  for (const key of keys) {
    const name = key.dataset.key;
    key.setAttribute("role", "button");
    key.setAttribute("tabindex", "0");
    key.setAttribute("aria-pressed", "true");
    key.onclick = () => {
      const shown = key.getAttribute("aria-pressed") !== "true";
      for (const same of keys.filter(k => k.dataset.key === name))
        same.setAttribute("aria-pressed", String(shown));
      for (const mark of marks(name)) mark.style.display = shown ? "" : "none";
    };
    key.onkeydown = e => {
      if (e.key === "Enter" || e.key === " ") {
        e.preventDefault();
        key.onclick();
      }
    };
  }
}
