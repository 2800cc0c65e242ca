// The read-out of the charts: by pointer, or with the arrow keys on a focused chart.
"use strict";
(() => {
  const all = JSON.parse(document.getElementById("curves").textContent);
  const box = document.getElementById("readout");
  const L = 58, R = 548, T = 14, B = 300;
  const numbers = (text) => text.split(" ").map(Number);
  const number = (v) => Math.abs(v) >= 1e4 ? v.toLocaleString("en", { maximumFractionDigits: 0 })
    : String(Number(v.toPrecision(4)));
  const sized = (v) => {
    for (const [size, unit] of [[1e12, "Tbit"], [1e9, "Gbit"], [1e6, "Mbit"], [1e3, "kbit"]])
      if (v >= size) return `${number(v / size)} ${unit}`;
    return `${number(v)} bit`;
  };
  const label = { step: (v) => `step ${number(v)}`, seconds: (v) => `${number(v)} s`, bits: sized };
  const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

  for (const svg of document.querySelectorAll(".chart")) {
    const measure = all[svg.dataset.measure], axis = svg.dataset.axis;
    const [x0, x1] = numbers(svg.dataset.x), [y0, y1] = numbers(svg.dataset.y);
    const scale = (v, a, b, log) => log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a);
    const px = (v) => L + scale(v, x0, x1, "xlog" in svg.dataset) * (R - L);
    const py = (v) => B + scale(v, y0, y1, "ylog" in svg.dataset) * (T - B);
    const rule = svg.querySelector(".rule"), dots = svg.querySelector(".dots");
    const series = measure.series.map((s) => ({
      ...s,
      points: s[axis].flatMap((x, i) => x === null || s.y[i] === null || !isFinite(px(x)) ? []
        : [{ x, y: s.y[i], px: px(x), low: s.low && s.low[i], high: s.high && s.high[i] }]),
    })).filter((s) => s.points.length);
    const stops = [...new Set(series.flatMap((s) => s.points.map((p) => p.px)))].sort((a, b) => a - b);
    let at = -1;

    const hide = () => {
      box.hidden = true;
      rule.style.visibility = "hidden";
      dots.replaceChildren();
    };
    const show = (stop, left, top) => {
      const rows = [], marks = [];
      let shown = null;
      for (const s of series) {
        const near = s.points.reduce((a, b) => Math.abs(b.px - stop) < Math.abs(a.px - stop) ? b : a);
        if (Math.abs(near.px - stop) > 28) continue;
        if (shown === null || Math.abs(near.px - stop) < Math.abs(px(shown) - stop)) shown = near.x;
        const row = make("div", ""), name = make("span", ` ${s.name}`), dot = make("i", "");
        row.className = `s${s.place % 8}`;
        name.prepend(dot);
        const range = near.low == null || near.low === near.high ? ""
          : ` (${number(near.low)} to ${number(near.high)})`;
        row.append(name, make("span", `${number(near.y)}${measure.unit}${range}`));
        rows.push(row);
        if (py(near.y) <= B + 1) {
          const c = document.createElementNS(svg.namespaceURI, "circle");
          c.setAttribute("cx", near.px);
          c.setAttribute("cy", py(near.y));
          c.setAttribute("r", 5);
          c.setAttribute("class", row.className);
          marks.push(c);
        }
      }
      if (!rows.length) return hide();
      box.replaceChildren(make("b", label[axis](shown)), ...rows);
      dots.replaceChildren(...marks);
      rule.setAttribute("x1", px(shown));
      rule.setAttribute("x2", px(shown));
      rule.style.visibility = "visible";
      box.hidden = false;
      const { width, height } = box.getBoundingClientRect();
      const free = document.documentElement.clientWidth - 8;
      box.style.left = `${Math.max(8, left + 18 + width > free ? left - width - 18 : left + 18)}px`;
      box.style.top = `${Math.max(8, Math.min(top - height / 2, window.innerHeight - height - 8))}px`;
    };
    const nearest = (x) => stops.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a, stops[0]);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const stop = nearest((event.clientX - frame.left) / frame.width * 560);
      at = stops.indexOf(stop);
      show(stop, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by || !stops.length) return undefined;
      event.preventDefault();
      at = Math.max(0, Math.min(stops.length - 1, at + by));
      const frame = svg.getBoundingClientRect();
      return show(stops[at], frame.left + stops[at] / 560 * frame.width, frame.top + frame.height / 2);
    });
  }
})();
