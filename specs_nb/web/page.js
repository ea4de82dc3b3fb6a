// The copy button; then the page says that its script has run.
for (const b of document.querySelectorAll("button.copy")) {
  b.hidden = false;
  b.onclick = async () => {
    const from = document.getElementById(b.dataset.from);
    try {
      await navigator.clipboard.writeText(from.textContent);
    } catch {
      getSelection().selectAllChildren(from);
      document.execCommand("copy");
    }
    b.textContent = "Copied";
    setTimeout(() => (b.textContent = "Copy"), 1500);
  };
}
document.documentElement.dataset.ready = "yes";
