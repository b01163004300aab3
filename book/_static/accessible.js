// What the theme, docutils and MathJax leave out for readers who use a keyboard or a
// screen reader.
document.addEventListener("DOMContentLoaded", async () => {
  // One label for every toggle would be read in place of the text that is seen.
  for (const summary of document.querySelectorAll("details.hide > summary")) {
    summary.removeAttribute("aria-label");
  }

  // In the table of contents a toggle is an arrow and nothing else.
  for (const summary of document.querySelectorAll(".has-children summary")) {
    const chapter = summary.closest("li").querySelector("a").textContent;
    summary.setAttribute("aria-label", `Sections of ${chapter}`);
  }

  // WAI-ARIA 1.2 deprecates the role that docutils gives the items of this list.
  for (const entry of document.querySelectorAll("[role=doc-biblioentry]")) {
    entry.setAttribute("role", "listitem");
  }

  // Sphinx writes the parameters of a long signature as definitions of nothing.
  for (const parameters of document.querySelectorAll("dt.sig > dl")) {
    parameters.setAttribute("role", "list");
    [...parameters.children].forEach((item) => item.setAttribute("role", "listitem"));
  }

  // A formula is a stop of the Tab key if it is wider than its line and so scrolls.
  const stops = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) {
        target.setAttribute("tabindex", "0");
      } else {
        target.removeAttribute("tabindex");
      }
    }
  });
  await window.MathJax?.startup?.promise;
  const formulas = ".bd-article :is(span.math, div.math mjx-container)";
  document.querySelectorAll(formulas).forEach((formula) => stops.observe(formula));
});
