// The filters of the examples.
const box = document.getElementById("examples");
if (box) {
  const form = box.querySelector("form"),
    cards = [...box.querySelectorAll(".card")],
    out = form.querySelector("output"),
    more = box.querySelector(".more");
  const fits = (want, is) => !want || want === is;
  let most = 12;
  const show = () => {
    const f = new FormData(form),
      words = f.get("text").toLowerCase().trim();
    let answers = 0,
      all = 0,
      shown = 0;
    for (const card of cards) {
      let any = 0;
      const asked = card.querySelector(".asked").textContent.toLowerCase();
      for (const s of card.querySelectorAll(".said")) {
        const fit =
          fits(f.get("split"), card.dataset.split) &&
          fits(f.get("model"), s.dataset.model) &&
          fits(f.get("right"), s.dataset.right) &&
          fits(f.get("form"), s.dataset.form) &&
          (!words || asked.includes(words) || s.textContent.toLowerCase().includes(words));
        s.hidden = !fit;
        all++;
        any += fit;
      }
      answers += any;
      card.hidden = !any || shown >= most;
      shown += !card.hidden;
    }
    const left = cards.filter(c => [...c.querySelectorAll(".said")].some(s => !s.hidden)).length - shown;
    out.value = answers
      ? `${answers} of ${all} answers fit; ${shown} question${shown === 1 ? "" : "s"} shown`
      : "no answer fits";
    out.dataset.fit = answers;
    more.hidden = !left;
    more.textContent = `Show more (${left} left)`;
  };
  form.hidden = false;
  box.querySelector("details").open = true;
  box.querySelector("summary").hidden = true;
  form.oninput = () => {
    most = 12;
    show();
  };
  form.onreset = () => setTimeout(form.oninput);
  form.onsubmit = e => e.preventDefault();
  more.onclick = () => {
    most += 24;
    show();
  };
  show();
}
