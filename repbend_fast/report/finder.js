const finder = event.target.closest('.finder');
if (finder) {
  const text = finder.querySelector('input').value.toLowerCase();
  const wanted = [...finder.querySelectorAll('select')].map(select => select.value);
  const active = text || wanted.some(Boolean);
  const group = finder.parentElement;
  let count = 0;
  for (const sample of group.querySelectorAll('.sample')) {
    const outcomes = JSON.parse(sample.dataset.outcomes);
    const shown = wanted.every((outcome, side) => !outcome || outcomes[side] === outcome)
      && (!text || sample.textContent.toLowerCase().includes(text));
    sample.hidden = !shown;
    count += shown;
  }
  for (const outcome of group.querySelectorAll('.outcome')) {
    outcome.hidden = !outcome.querySelector('.sample:not([hidden])');
    const rest = outcome.querySelector('details.rest');
    if (rest && active) rest.open = true;
  }
  finder.querySelector('output').value = active ? count + ' found' : '';
}
