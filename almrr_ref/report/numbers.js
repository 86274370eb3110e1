// How the report's page and the station's (serve/) write numbers.

// As few digits as tell a threshold from its neighbours, also close to 1.
function digits(value) {
  if (!(value > 0 && value < 1)) return String(value);
  return value.toFixed(Math.min(100, Math.max(4, 3 - Math.floor(Math.log10(Math.min(value, 1 - value))))));
}

// As thresholds.py says it: 0.37%, 1%, 42%.
const percent = share =>
  `${share < 0.1 ? Number((100 * share).toPrecision(2)) : Math.min(share < 1 ? 99 : 100, Math.round(100 * share))}%`;
