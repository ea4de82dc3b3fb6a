// What Plot is told for each kind of chart, and what is said where the pointer is.
const {charts, looks} = JSON.parse(document.getElementById("charts").textContent);
const number = x =>
  (Math.abs(x) >= 1000
    ? x.toFixed(0)
    : Number.isInteger(x)
      ? String(x)
      : Math.abs(x) >= 10
        ? x.toFixed(1)
        : x.toPrecision(3)
  ).replace("-", "−");
const span = (x, lo, hi) => (lo == null ? number(x) : `${number(x)} [${number(lo)}, ${number(hi)}]`);
const told = {
  lines: (c, d) =>
    `${d.name}\n${c.x} ${d.x}: ${span(d.y, d.lo, d.hi)}` +
    (d.raw == null ? "" : `\nas logged: ${number(d.raw)}`),
  dots: (c, d) => `${d.name}, ${d.group}\n${span(d.x, d.xlo, d.xhi)}${d.n ? `\nn = ${d.n}` : ""}`,
  plane: (c, d) => `${d.name} ${d.label ?? ""}\nID ${span(d.x, d.xlo, d.xhi)}\nOOD ${span(d.y, d.lo, d.hi)}`
};
const tip = (c, points, pointer, y = "y") =>
  Plot.tip(points, pointer({x: "x", y, title: d => told[c.kind](c, d)}));
const parts = {
  lines(c, names, points) {
    const marks = names.flatMap(n => {
      const own = points.filter(d => d.name === n),
        {symbol, dash} = looks[c.inks[n]],
        stroke = `var(--${c.inks[n]})`;
      return [
        Plot.areaY(
          own.filter(d => d.lo != null),
          {x: "x", y1: "lo", y2: "hi", fill: stroke, fillOpacity: 0.14}
        ),
        Plot.lineY(
          own.filter(d => d.raw != null),
          {x: "x", y: "raw", stroke, strokeOpacity: 0.3, strokeWidth: 0.8}
        ),
        Plot.lineY(own, {x: "x", y: "y", stroke, strokeWidth: 2, strokeDasharray: dash}),
        own.length > 15 ? null : Plot.dot(own, {x: "x", y: "y", fill: stroke, symbol, r: 4})
      ];
    });
    return {
      height: 250,
      marginLeft: 48,
      marginBottom: 40,
      x: {
        label: c.x,
        ...(c.log
          ? {type: "log", base: 2, ticks: [...new Set(points.map(d => d.x))], tickFormat: String}
          : {nice: false})
      },
      y: {label: c.y || null, grid: true, zero: c.zero, nice: true},
      marks: [
        ...marks,
        Plot.ruleX(points, Plot.pointerX({x: "x", strokeOpacity: 0.3})),
        tip(c, points, Plot.pointer)
      ]
    };
  },
  dots(c, names, points) {
    const groups = [...new Set(c.points.map(d => d.group))],
      place = (group, name = "") => `${group}\n${name}`;
    const rows = groups.flatMap(g => [place(g), ...names.map(n => place(g, n))]),
      each = {y: d => place(d.group, d.name)};
    const short = row => {
      const n = row.split("\n")[1];
      return n.length > 22 ? n.slice(0, 21) + "…" : n;
    };
    return {
      height: 44 + 20 * rows.length,
      marginTop: 4,
      marginBottom: 40,
      marginLeft: 14 + 6.4 * Math.max(...rows.map(r => short(r).length)),
      x: {label: c.x, grid: true, nice: true},
      y: {type: "point", domain: rows, label: null, tickFormat: short, tickSize: 0, padding: 0.6},
      marks: [
        Plot.text(groups, {y: g => place(g), text: g => g, frameAnchor: "left", fontWeight: 600}),
        Plot.ruleY(points, {
          ...each,
          x1: "xlo",
          x2: "xhi",
          stroke: d => `var(--${c.inks[d.name]})`,
          strokeWidth: 2
        }),
        ...names.map(n =>
          Plot.dot(
            points.filter(d => d.name === n),
            {...each, x: "x", fill: `var(--${c.inks[n]})`, symbol: looks[c.inks[n]].symbol, r: 4.5}
          )
        ),
        tip(c, points, Plot.pointer, each.y)
      ]
    };
  },
  plane(c, names, points) {
    const ends = c.guides.map(([label, line]) => ({label, x: line.at(-1)[0], y: line.at(-1)[1]}));
    return {
      height: 340,
      marginLeft: 44,
      marginRight: 48,
      marginBottom: 40,
      x: {label: c.x, domain: [0, 100], grid: true},
      y: {label: c.y, domain: [0, 100], grid: true},
      marks: [
        ...c.guides.map(([, line]) => Plot.line(line, {x: d => d[0], y: d => d[1], strokeOpacity: 0.35})),
        Plot.text(ends, {x: "x", y: "y", text: "label", textAnchor: "start", dx: 5, fillOpacity: 0.8}),
        ...names.flatMap(n => {
          const own = points.filter(d => d.name === n),
            ink = `var(--${c.inks[n]})`;
          return [
            Plot.ruleX(own, {x: "x", y1: "lo", y2: "hi", stroke: ink}),
            Plot.ruleY(own, {y: "y", x1: "xlo", x2: "xhi", stroke: ink}),
            Plot.dot(own, {x: "x", y: "y", fill: ink, symbol: looks[c.inks[n]].symbol, r: 5}),
            ...["start", "end"].map(textAnchor =>
              Plot.text(
                own.filter(d => (d.x > 60) === (textAnchor === "end")),
                {
                  x: "x",
                  y: "y",
                  text: d => d.label ?? "",
                  dx: textAnchor === "end" ? -7 : 7,
                  dy: -7,
                  textAnchor,
                  fill: ink
                }
              )
            )
          ];
        }),
        tip(c, points, Plot.pointer)
      ]
    };
  }
};
