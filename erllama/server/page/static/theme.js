// Applies the chosen theme before the page is drawn. Loaded as a plain script for that reason.
"use strict";
try {
  const theme = localStorage.getItem("erllama.theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // The browser keeps nothing for this page: the system's theme applies.
}
