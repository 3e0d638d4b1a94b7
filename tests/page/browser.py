"""A reader at a browser: what they do to the page of a dump, and what they see of it."""

from selenium import webdriver
from selenium.webdriver.common.by import By

# Those after --no-sandbox keep Chromium from asking the network for anything of its own.
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-sandbox",
    "--no-first-run",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)


def start(chromium, driver, profile):
    """A browser without a window; `profile` is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """The pages in a folder, in one browser."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def open(self, name, view="", width=1440, height=900, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")  # so that an address that differs in its hash alone is loaded anew
        self.driver.get(f"{(self.folder / name).as_uri()}.html{view and '#' + view}")

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def key(self, *keys):
        self.driver.find_element(By.TAG_NAME, "body").send_keys(*keys)

    def find(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css):
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css)

    def boxes(self, side="after"):
        """The titles of the boxes on the screen."""
        return self.texts(f"[data-pane={side}] .box > .label")

    def selected(self, side="after"):
        return self.texts(f"[data-pane={side}] .box.selected > .label")

    def click_box(self, title, side="after", part=".label", double=False):
        """Clicks, as a mouse does, in the middle of a part of the first box or frame with this title."""
        found = self.js(
            """const [side, title, part] = arguments;
            const boxes = [...document.querySelectorAll(`[data-pane=${side}] .boxes > [data-id]`)];
            const box = boxes.find((each) => each.querySelector(".label").textContent === title);
            return box && box.querySelector(part);""",
            side,
            title,
            part,
        )
        assert found, f"no box {title!r} among {self.boxes(side)}"
        mouse = webdriver.ActionChains(self.driver).move_to_element(found)
        (mouse.double_click() if double else mouse.click()).perform()

    def address(self):
        return self.js("return location.hash")

    def panel(self):
        return self.find("#panel").text
