// Charts are put into their figures, with a legend whose names can be switched off.
const make = (tag, text, more) => Object.assign(document.createElement(tag), {textContent: text, ...more});
function put(figure) {
  const c = charts[figure.dataset.chart],
    off = (figure.off ??= new Set()),
    box = figure.querySelector(".plot");
  const names = Object.keys(c.inks).filter(n => !off.has(n) && c.points.some(d => d.name === n));
  const {marks, ...how} = parts[c.kind](
    c,
    names,
    c.points.filter(d => names.includes(d.name))
  );
  box.replaceChildren(
    Plot.plot({
      width: Math.max(280, Math.min(box.clientWidth, 620)),
      style: {background: "none", fontSize: "12px"},
      ariaLabel: c.title,
      ...how,
      marks
    })
  );
  figure.dataset.drawn = names.length;
}
function legend(figure) {
  const c = charts[figure.dataset.chart],
    names = Object.keys(c.inks).filter(n => c.points.some(d => d.name === n)),
    row = make("div", "", {className: "legend"});
  for (const n of names) {
    const b = make("button", n, {type: "button", title: "show or hide"});
    b.style.setProperty("--own", `var(--${c.inks[n]})`);
    b.ariaPressed = "true";
    b.onclick = () => {
      figure.off.has(n) ? figure.off.delete(n) : figure.off.size < names.length - 1 && figure.off.add(n);
      b.ariaPressed = String(!figure.off.has(n));
      put(figure);
    };
    row.append(b);
  }
  figure.querySelector(".plot").after(row);
}
const figures = [...document.querySelectorAll("figure[data-chart]")];
for (const f of figures)
  try {
    put(f);
    legend(f);
  } catch (e) {
    console.error(e);
  }
let wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== wide) {
    wide = innerWidth;
    figures.filter(f => f.dataset.drawn).forEach(put);
  }
});
