// Tables that scroll sideways can be reached and scrolled by keys.
const reach = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", reach);
addEventListener("resize", reach);

// What the theme leaves without a name of its own: the search, and lists inside of lists of contents.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
for (const inner of document.querySelectorAll("nav nav[aria-label]")) {
  inner.removeAttribute("aria-label");
  inner.setAttribute("role", "none");
}
