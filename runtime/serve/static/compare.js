// Two pictures under a movable border, by mouse, touch and keyboard, with zoom.

export class Compare {
  constructor(box, zoomed, before, handle, zoomValue) {
    Object.assign(this, { box, zoomed, before, handle, zoomValue, border: 50, zoom: 1 });
    handle.addEventListener("keydown", (event) => this.key(event));
    const drag = (event) => {
      if (!event.buttons && event.pointerType === "mouse") return;
      const place = this.zoomed.getBoundingClientRect();
      this.move(((event.clientX - place.left) / place.width) * 100);
    };
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      drag(event);
    });
    handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && drag(event));
  }

  key(event) {
    const step = event.shiftKey ? 10 : 2;
    const moves = {
      ArrowLeft: this.border - step, ArrowDown: this.border - step, ArrowRight: this.border + step,
      ArrowUp: this.border + step, PageDown: this.border - 10, PageUp: this.border + 10, Home: 0, End: 100,
    };
    if (event.key in moves) this.move(moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.scale(this.zoom * 1.5);
    else if (event.key === "-") this.scale(this.zoom / 1.5);
    else return;
    event.preventDefault();
  }

  move(percent) {
    this.border = Math.min(Math.max(percent, 0), 100);
    this.before.style.clipPath = `inset(0 ${100 - this.border}% 0 0)`;
    this.handle.style.left = `${(this.border / 100) * this.zoomed.offsetWidth}px`;
    this.handle.style.height = `${this.zoomed.offsetHeight}px`;
    this.handle.setAttribute("aria-valuenow", Math.round(this.border));
    this.handle.setAttribute("aria-valuetext", `${Math.round(this.border)} percent before`);
  }

  scale(zoom) {
    this.zoom = Math.min(Math.max(zoom, 1), 16);
    this.zoomed.style.width = `${this.zoom * 100}%`;
    this.zoomValue.textContent = `${Math.round(this.zoom * 100)} %`;
    this.move(this.border);
  }
}
