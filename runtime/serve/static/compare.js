// Two pictures under a movable border, by mouse, touch and keyboard, with zoom.

const MOST = 16; // display pixels for a pixel of the result

export class Compare {
  // `box` scrolls, `picture` holds both images and the handle; `changed` is called with the zoom in percent.
  constructor({ box, picture, before, after, handle, changed }) {
    Object.assign(this, { box, picture, before, after, handle, changed, border: 50, zoom: 1 });
    const drag = (event) => {
      const place = picture.getBoundingClientRect();
      this.move(((event.clientX - place.left) / place.width) * 100);
    };
    handle.addEventListener("keydown", (event) => this.key(event));
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      drag(event);
    });
    handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && drag(event));
    picture.addEventListener("click", (event) => handle.contains(event.target) || handle.hidden || drag(event));
    box.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // a pinch on a touchpad comes as a wheel with ctrl
      event.preventDefault();
      this.scale(this.zoom * Math.exp(-event.deltaY / 200), event.clientX, event.clientY);
    }, { passive: false });
  }

  key(event) {
    const step = event.shiftKey ? 10 : 2;
    const moves = {
      ArrowLeft: this.border - step, ArrowDown: this.border - step, ArrowRight: this.border + step,
      ArrowUp: this.border + step, PageDown: this.border - 10, PageUp: this.border + 10, Home: 0, End: 100,
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) this.move(moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.scale(this.zoom * 1.5);
    else if (event.key === "-") this.scale(this.zoom / 1.5);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }

  // Move the border to a part of the width in percent: the picture as it was sent lies left of it.
  move(percent) {
    this.border = Math.min(Math.max(percent, 0), 100);
    this.before.style.clipPath = `inset(0 ${100 - this.border}% 0 0)`;
    this.handle.style.left = `${this.border}%`;
    this.handle.setAttribute("aria-valuenow", Math.round(this.border));
    this.handle.setAttribute("aria-valuetext", `${Math.round(this.border)} percent before`);
  }

  // Show the whole picture, in its own size if there is room for that.
  fit() {
    this.least = Math.min(1, this.box.clientWidth / this.after.naturalWidth);
    this.scale(this.least);
  }

  // Zoom while a point of the window, by default the middle of the box, keeps its place.
  scale(zoom, x, y) {
    const place = this.box.getBoundingClientRect();
    const [dx, dy] = [x === undefined ? place.width / 2 : x - place.left, y === undefined ? place.height / 2 : y - place.top];
    const before = this.zoom;
    this.zoom = Math.min(Math.max(zoom, this.least), MOST);
    const factor = this.zoom / before;
    const [left, top] = [(this.box.scrollLeft + dx) * factor - dx, (this.box.scrollTop + dy) * factor - dy];
    this.picture.style.width = `${this.after.naturalWidth * this.zoom}px`;
    this.box.scrollTo(left, top);
    this.box.classList.toggle("pixels", this.zoom > 2);
    this.box.tabIndex = this.zoom > this.least ? 0 : -1; // arrow keys scroll it when there is something to scroll
    this.changed(Math.round(this.zoom * 100));
  }
}
