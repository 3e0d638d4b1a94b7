"""The page in a real browser: what is drawn, what opens, what the keyboard does, and no errors on the way.

With RECOMPILE_SCREENSHOTS=1 it also writes docs/page/*.png: the pages of real models.
"""

import os
import time
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = webdriver.Keys

CROSS = "\N{MULTIPLICATION SIGN}"
OVERLAPS, CONTRAST = ((Path(__file__).parent / name).read_text() for name in ("overlaps.js", "contrast.js"))


def test_a_thousand_tables_are_one_screen(page):
    page.open("tables", "graph=0&pass=0")
    shown = page.boxes()
    assert shown[:2] == [f"1000 {CROSS} ids_*", f"1000 {CROSS} embedding"] and len(shown) < 12
    inside = page.js("""const pane = document.querySelector(".pane svg").getBoundingClientRect();
        return [...document.querySelectorAll(".box")].every((e) => e.getBoundingClientRect().bottom < pane.bottom)""")
    assert inside


def test_a_large_graph_opens_in_a_second(page):
    start = time.perf_counter()
    page.open("large")
    assert page.boxes()
    assert time.perf_counter() - start < 3  # 0.5 s on a busy machine of two cores; loads and answers included
    spent = page.js(
        "const [t] = performance.getEntriesByType('navigation'); return t.loadEventEnd - t.responseEnd"
    )
    assert spent < 1000


DRAWN = "return document.querySelectorAll('[data-pane=after] .boxes > .box').length"


def test_of_a_large_graph_only_what_can_be_seen_is_drawn(page):
    page.open("large", "pass=1")
    spent = page.js(
        "const t = performance.now(); ACTS.expand(); panes.after.seen(); return performance.now() - t"
    )
    assert spent < 2000 and 20 < page.js(DRAWN) < 1000  # 0.3 s and 180 boxes on a busy machine of two cores
    first = set(page.boxes())
    page.js("panes.after.y -= 5000; panes.after.move()")  # as a drag does
    assert 20 < page.js(DRAWN) < 1000 and set(page.boxes()) != first
    page.js("selectNode('n_4900')")
    assert page.selected() == page.selected("before") != []
    page.key("0")  # all of it, too small to be read: faces without labels
    assert page.js(DRAWN) > 4900 and not page.boxes()
    assert (
        len(page.js("return [...document.querySelectorAll('[data-pane=after] .selected')].map(String)")) == 1
    )
    page.js("panes.after.zoom(60, ...panes.after.centre())")
    assert 0 < len(page.boxes()) < 1000


@pytest.mark.parametrize("keys", ["", "c", "e"])
@pytest.mark.parametrize(("name", "view"), [("tables", "pass=2"), ("large", "pass=1")])
def test_nothing_overlaps_open_or_closed(page, name, view, keys):
    page.open(name, f"{view}&side=after")
    if keys:
        page.key(keys)
    count, overlapping, too_wide = page.js(OVERLAPS)
    assert count > 2 and not overlapping and not too_wide


def test_an_open_fold_overlaps_nothing(page):
    page.open("few", "pass=2")
    page.key("f")
    assert "embedding_3" in page.boxes("before")
    count, overlapping, too_wide = page.js(OVERLAPS)
    assert count > 12 and not overlapping and not too_wide


def test_a_group_opens_and_closes_in_place(page):
    page.open("tables", "pass=0")
    page.key("c")
    assert "tower" in page.boxes()
    page.click_box("tower", part=".hand")
    assert "tower" not in page.boxes() and page.boxes()[-3:] == ["linear", "relu", "output"]
    page.click_box("tower")
    page.key("o")
    assert "tower" in page.boxes()


def test_a_double_click_opens_a_fold(page):
    page.open("few", "pass=0")
    page.click_box(f"4 {CROSS} embedding", double=True)
    assert "embedding_2" in page.boxes()


def test_selection_shows_the_node_and_follows_the_rewrite(page):
    page.open("tables", "pass=2")
    page.click_box("lookup")
    assert page.selected("after") == ["lookup"]
    assert page.selected("before") == [f"1000 {CROSS} embedding", "cat"]
    panel = page.panel()
    assert "lookup_default" in panel and "made by fuse-lookups" in panel and "model.py:5 in forward" in panel
    assert "void lookup(const float* table" in panel
    assert "void" in page.texts("#panel .c-keyword")
    assert page.address() == "#graph=0&pass=fuse-lookups&node=lookup_default"


def test_selection_follows_backwards_too(page):
    page.open("tables", "pass=2")
    page.click_box("cat", "before")
    assert page.selected("after") == ["lookup", "getitem"]
    page.click_box("relu", "before")
    assert page.selected("after") == ["relu"]


def test_the_panel_of_a_node_tells_its_refusals_and_its_life(page):
    page.open("tables", "pass=2&node=relu_0")
    assert "did not fire: fewer than 2 lookups to fuse" in page.panel()
    page.open("tables", "pass=0&node=cat")
    assert "gone in fuse-lookups" in page.panel() and "lookup_default" in page.panel()


def test_a_recorded_rewrite_selects_both_its_sides(page):
    page.open("tables", "pass=2")
    page.find(".rewrite-link").click()
    assert page.selected("before") == [f"1000 {CROSS} embedding", "cat"]
    assert page.selected("after") == ["lookup", "getitem"]


def test_a_link_restores_the_view(page):
    page.open("tables", "graph=0&pass=0&node=embedding_7")
    assert "embedding_7" in page.selected()
    assert page.texts(".pass.chosen .name") == ["captured"]
    assert "tables.7.weight" in page.panel()
    page.open("tables", "graph=0&pass=2&view=diff")
    assert page.texts("#tabs .on") == ["Diff"]
    page.open("tables", "pass=canonicalize")
    assert page.texts(".pass.chosen .name") == ["canonicalize"]


def test_a_link_to_what_is_not_there_says_so(page):
    page.open("tables", "graph=9&pass=77&node=nonsense")
    assert "nonsense is not in this stage" in page.panel()
    assert page.texts(".pass.chosen .name") == ["fuse-lookups"]


def test_the_diff_hides_what_is_unchanged_until_asked(page):
    page.open("tables", "pass=2&view=diff")
    closed = page.texts(".closed-run")
    assert closed and closed[0] == "⋯ 1,997 lines unchanged"
    rows = len(page.texts(".row"))
    assert page.texts(".cell.made")[0].startswith("model.py:5lookup_default: f32[64, 16] = recompile.lookup")
    assert page.texts(".cell.changed mark") == ["cat", "getitem"]
    page.find(".closed-run").click()
    assert len(page.texts(".row")) == rows + 1997


def test_a_line_of_the_diff_shows_its_node(page):
    page.open("few", "pass=2&view=diff")
    page.find(".cell.made").click()
    assert "lookup_default" in page.panel() and "node=lookup_default" in page.address()


def test_search_finds_lines_and_modules_and_walks_the_results(page):
    page.open("tables", "pass=2")
    page.key("/")
    page.find("#search").send_keys("relu tower.3")
    assert page.texts("#found b") == ["relu_1"]
    page.find("#search").send_keys(Keys.ENTER)
    assert page.texts("#count") == ["1 of 1"]
    assert page.selected() == ["relu"] and "relu_1" in page.panel()
    page.key(Keys.ESCAPE)
    page.key("/")
    page.find("#search").send_keys("no such thing")
    assert page.texts("#found") == ["Nothing found in this stage."]
    page.key(Keys.ESCAPE)


def test_search_opens_the_fold_around_a_result(page):
    page.open("few", "pass=0")
    page.key("/")
    page.find("#search").send_keys("embedding_2", Keys.ENTER)
    assert page.selected() == ["embedding_2"]
    page.key(Keys.ESCAPE)


def test_the_keyboard_walks_passes_and_views(page):
    page.open("tables", "pass=0")
    page.key("j")
    assert page.texts(".pass.chosen .name") == ["canonicalize"]
    page.key("k", "J")
    assert page.texts(".pass.chosen .name") == ["fuse-lookups"]
    page.key("K")
    assert page.texts(".pass.chosen .name") == ["captured"]
    page.key("j", "j", "d", "f", "o")  # there is nothing to fold in a diff
    assert page.texts("#tabs .on") == ["Diff"] and page.texts(".diff")
    page.key("d", "s")
    assert page.texts("#sides .on") == ["After"] and len(page.texts(".pane")) == 1
    page.key("?")
    assert page.js("return document.getElementById('help').open")
    assert "next pass that changed the graph" in page.find("#help").text
    page.key(Keys.ESCAPE)
    assert not page.js("return document.getElementById('help').open")


def test_changed_only_hides_passes_that_changed_nothing(page):
    page.open("tables")
    assert page.texts(".pass .name") == ["captured", "canonicalize", "fuse-lookups"]
    page.find("#changed").click()
    assert page.texts(".pass .name") == ["captured", "fuse-lookups"]


def test_wheel_zooms_and_drag_moves(page):
    page.open("tables", "pass=0")
    camera = "return document.querySelector('.camera').getAttribute('transform')"
    first = page.js(camera)
    svg = page.find(".pane svg")
    webdriver.ActionChains(page.driver).move_to_element(svg).scroll_by_amount(0, -200).perform()
    wheel = webdriver.common.actions.wheel_input.ScrollOrigin.from_element(svg)
    webdriver.ActionChains(page.driver).scroll_from_origin(wheel, 0, -200).perform()
    zoomed = page.js(camera)
    assert float(zoomed.split("scale(")[1][:-1]) > float(first.split("scale(")[1][:-1])
    webdriver.ActionChains(page.driver).drag_and_drop_by_offset(svg, 60, 40).perform()
    assert page.js(camera) != zoomed
    page.key("0")


def test_two_fingers_zoom(page):
    page.open("tables", "pass=0", width=390, height=844)
    scale = "return Object.values(panes)[0].scale"
    before = page.js(scale)
    for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 120), ("touchEnd", 0)):
        points = [{"x": 190 - apart / 2, "y": 600, "id": 0}, {"x": 190 + apart / 2, "y": 600, "id": 1}]
        touches = {"type": kind, "touchPoints": points if apart else []}
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", touches)
    assert page.js(scale) > before * 1.5


def test_dark_and_light(page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.open("tables", "pass=2")
    light = page.js(colour)
    page.open("tables", "pass=2", dark=True)
    dark = page.js(colour)
    assert sum(map(int, dark[4:-1].split(","))) < 200 < 600 < sum(map(int, light[4:-1].split(",")))
    page.key("t")
    assert page.js(colour) == light
    page.key("t")
    assert page.js(colour) == dark


def test_text_can_be_read_on_its_ground(page):
    """Contrast of at least 4.5 to 1 for text, as WCAG 2.2 asks (1.4.3)."""
    for dark in (False, True):
        page.open("tables", "pass=2&node=lookup_default", dark=dark)
        low = page.js(CONTRAST)
        assert low == []


def test_a_phone_shows_one_side_and_never_scrolls_sideways(page):
    page.open("tables", "pass=2", width=390, height=844)
    assert len(page.texts(".pane")) == 1
    assert page.js("return document.documentElement.scrollWidth") == 390
    page.click_box("lookup")
    sheet, box = page.js("""return [document.getElementById("panel"), document.querySelector(".selected")]
        .map((e) => e.getBoundingClientRect().toJSON())""")
    assert box["bottom"] <= sheet["top"] and sheet["bottom"] == 844
    page.find(".close").click()
    assert page.selected() == []


def test_costs_colour_the_boxes(page):
    page.open("few", "pass=2&side=after")
    assert not page.texts(".heat-4")
    page.find("#colour").click()
    assert page.texts(".box.heat-4 > .label") == ["linear"]
    page.open("tables", "pass=0")
    assert page.js("return document.getElementById('colour').hidden")


def test_boxes_are_coloured_by_every_cost_that_is_known(page):
    page.open("measured", "pass=fuse-lookups&side=after")
    seen = []
    for _ in range(5):
        page.key("b")
        seen += page.texts("#colour")
    assert seen == ["By bytes", "By operations", "By predicted time", "By measured time", "By kind"]
    page.open("measured", "pass=fuse-lookups&side=after&colour=measured")
    assert page.texts(".box.heat-4 > .label") == ["lookup"] and "0.279 ms" in page.find("#legend").text
    page.key("b", "b", "b", "b")
    assert "colour=predicted" in page.address()
    assert page.texts(".box.heat-4 > .label") == ["linear", "linear"]
    page.open("few", "colour=predicted")  # no machine is known
    assert page.texts("#colour") == ["By kind"]


def test_the_panel_tells_what_a_region_costs_beside_what_it_replaced(page):
    page.open("measured", "pass=fuse-lookups&node=lookup_default")
    shown = page.panel()
    assert (
        "9.29 MB → 5.82 MB" in shown and "9290000 → 90900*s0" in shown and "1.51 MFLOP → 1.06 MFLOP" in shown
    )
    assert "0.279 ms measured, bound by memory, 52% of what the machine reaches" in shown
    page.click_box("linear")
    assert "4.1 kB" in page.panel() and "20 µs predicted" in page.panel()
    page.open("measured", "pass=fuse-lookups")
    assert "9.29 MB → 5.82 MB" in page.panel()


def test_arrow_keys_walk_along_the_edges(page):
    page.open("few", "pass=fuse-lookups&side=after")
    walked = []
    for key in (Keys.UP, Keys.DOWN, Keys.DOWN, Keys.DOWN, Keys.UP, Keys.LEFT):
        page.key(key)
        walked += page.selected()
    assert walked == [f"4 {CROSS} ids_*", "lookup", "getitem", "linear", "getitem", "getitem"]
    assert "node=getitem" in page.address() and "getitem" in page.panel()
    page.key("d", Keys.UP)  # scrolls the text
    assert "node=getitem" in page.address()
    page.open("few", "pass=captured&node=embedding_1")
    page.key(Keys.RIGHT)
    assert page.selected() == ["embedding_2"]
    page.key(Keys.LEFT, Keys.LEFT, Keys.DOWN)
    assert page.selected() == ["cat"]
    assert page.js("const { svg } = panes.after; svg.focus(); return document.activeElement === svg")
    page.key("?")
    assert "to a box that reads the selected one" in page.find("#help").text


def test_kernels_are_listed_with_their_source(page):
    page.open("tables", "pass=2&view=kernels")
    assert page.texts(".files button") == ["lookup.cpp"]
    assert 'use(table[i], "a < b");  // </script>' in page.texts("pre.whole")[0]
    assert "// region lookup_default" in page.texts(".c-comment")


def test_hostile_lines_are_shown_and_not_run(page):
    page.open("hostile", "pass=2&node=lookup_default")
    shown = page.panel()
    assert "</script><script>alert('x')</script>" in shown and "é 表" in shown
    for view in ("diff", "graph"):
        page.open("hostile", f"pass=2&view={view}")
        assert len(page.texts("script")) == 2


def test_what_failed_is_said(page):
    page.open("failed", "graph=0&pass=1")
    assert "undone: RecompileError: <b>x</b>" in page.panel()
    assert page.texts(".pass .what")[1:] == ["undone", "did not run"]
    page.key("g")
    assert "graph=1" in page.address()
    assert page.texts(".banner") == [
        "Compiled by plain Inductor: recompile has an internal error, <i>ValueError</i> model.py:1 in forward: x"
    ]


def test_the_largest_graph_is_shown_first(page):
    page.open("several")
    assert "graph=1" in page.address()
    assert page.texts("#graphs option") == [
        "0: Model.forward model.py:5 (12 nodes, 23 ms)",
        "1: Model.forward model.py:5 (30 nodes, 23 ms)",
    ]


def test_it_asks_the_network_for_nothing(page):
    page.open("tables", "pass=2")
    assert page.js("return performance.getEntriesByType('resource').length") == 0


PICTURES = {
    "passes": ("models", "graph=0&pass=fuse-lookups", {}),
    "selection": ("models", "graph=0&pass=fuse-lookups&node=lookup_default", {}),
    "diff": ("models", "graph=1&pass=fold-pairwise-linear&view=diff", {"height": 620}),
    "dark": ("models", "graph=1&pass=fuse-lookups", {"dark": True}),
    "costs": ("models", "graph=1&pass=fuse-lookups&side=after&colour=predicted", {}),
    "phone": ("models", "graph=0&pass=fuse-lookups&node=lookup_default", {"width": 390, "height": 844}),
    "tables": ("tables", "pass=fuse-lookups", {"height": 600}),
}


@pytest.mark.skipif(
    os.environ.get("RECOMPILE_SCREENSHOTS") != "1", reason="RECOMPILE_SCREENSHOTS=1 asks for it"
)
def test_pictures_for_the_documentation(page, folder):
    dump_models(folder / "dump", "rechub.MMOE", "rechub.DIN")
    (folder / "dump" / "index.html").rename(folder / "models.html")
    pictures = Path(__file__).parents[2] / "docs" / "page"
    pictures.mkdir(exist_ok=True)
    for name, (dump, view, screen) in PICTURES.items():
        page.open(dump, view, **{"width": 1200, "height": 680, **screen})
        page.driver.save_screenshot(str(pictures / f"{name}.png"))
        assert (pictures / f"{name}.png").stat().st_size < 200_000


def dump_models(out, *names):
    import recompile
    from recompile.zoo import build

    with recompile.dump(out):
        for name in names:
            built = build(name, scale=0.001)
            recompile.explain(built.model.eval(), *built.inputs(64), profile=True)
