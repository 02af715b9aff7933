"""The page in a real browser: before, after, reasoning, and errors."""

import json
import os
import pathlib
import shutil

import pytest

from . import live

webdriver = pytest.importorskip(
  'selenium.webdriver', reason='needs the extra: gr2_jax[dev]'
)
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason='no chromium and chromedriver (Debian: chromium, chromium-driver)',
  ),
]


@pytest.fixture(scope='module')
def service(reranker):
  with live.serving(reranker, examples=True, seconds=60.0) as found:
    yield found


@pytest.fixture(scope='module')
def browser():
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage'):
    options.add_argument(f'--{flag}')
  options.add_argument('--window-size=1100,1000')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
  found.set_page_load_timeout(120)
  yield found
  found.quit()


def text(browser, name):
  return browser.find_element('id', name).text


def lines(browser, selector):
  script = 'return [...document.querySelectorAll(arguments[0])]'
  return browser.execute_script(f'{script}.map((x) => x.innerText)', selector)


def settled(browser):
  live.until(
    lambda: (
      text(browser, 'state') not in ('', 'ranking ...')
      and ('ms' in text(browser, 'state') or bad(browser))
    )
  )


def bad(browser):
  return 'bad' in browser.find_element('id', 'state').get_attribute('class')


def test_a_slate_before_and_after_with_its_reasoning(
  browser, service, reranker, tmp_path
):
  browser.get(service.url)
  settled(browser)
  before, after = lines(browser, '#before li'), lines(browser, '#after li')
  assert len(before) == len(after) > 1
  catalog = reranker.knowledge.log.catalog
  titles = set(catalog.titles)
  for row in before:
    assert any(row.startswith(title) for title in titles)
  assert any(mark != '=' for mark in lines(browser, '#after .moved'))
  reasoning = browser.find_element('id', 'reasoning')
  assert reasoning.get_attribute('textContent')
  assert '<slot' not in text(browser, 'reasoning')
  assert 'reason' in text(browser, 'state')
  folder = pathlib.Path(os.environ.get('GR2_JAX_ARTIFACTS') or tmp_path)
  picture = folder / 'page.png'
  assert browser.save_screenshot(str(picture))
  assert picture.stat().st_size > 10_000
  browser.find_element('id', 'another').click()
  live.until(lambda: lines(browser, '#before li') != before)
  settled(browser)
  errors = [e for e in browser.get_log('browser') if e['level'] == 'SEVERE']
  assert [e for e in errors if 'favicon' not in e['message']] == []


def test_every_mode_can_be_chosen(browser, service):
  browser.get(service.url)
  settled(browser)
  options = browser.find_elements('css selector', '#mode option')
  assert [option.text for option in options] == ['score', 'rank', 'reason']
  options[0].click()
  browser.find_element('id', 'rank').click()
  live.until(lambda: ', score,' in text(browser, 'state'))
  assert 'writes no reasoning' in text(browser, 'reasoning')


@pytest.mark.parametrize(
  ('slate', 'message'),
  [
    ('{', 'The slate is not JSON'),
    ('{"history": [], "candidates": []}', 'give one or more'),
  ],
)
def test_errors_are_shown(browser, service, slate, message):
  browser.get(service.url)
  settled(browser)
  browser.find_element('css selector', '#edit summary').click()
  box = browser.find_element('id', 'slate')
  box.clear()
  box.send_keys(slate)
  browser.find_element('id', 'rank').click()
  live.until(lambda: message in text(browser, 'state'))
  assert bad(browser)


def test_titles_are_text_and_never_markup(browser, service):
  browser.get(service.url)
  settled(browser)
  browser.find_element('css selector', '#edit summary').click()
  box = browser.find_element('id', 'slate')
  box.clear()
  name = '<img src=x onerror=document.title=1>'
  items = [{'item_id': 'new', 'title': f'{name} anew'}]
  slate = {'history': [], 'candidates': [name, 'new'], 'items': items}
  box.send_keys(json.dumps(slate))
  browser.find_element('id', 'rank').click()
  live.until(lambda: f'{name} (unknown)' in text(browser, 'before'))
  assert f'{name} anew (described)' in text(browser, 'before')
  assert browser.title.startswith('gr2_jax')
