// A browser starts no worker from a page that was opened as a file. Here the search's worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = this.inside.document.createElement("script");
      script.onload = () => {
        for (const data of this.waiting.splice(0)) this.tell(data);
        this.ready = true;
      };
      script.src = new URL(url, location.href).href;
      this.inside.document.body.append(script);
    }
    set onmessage(heard) { this.addEventListener("message", heard); }
    tell(data) { this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })); }
    postMessage(data) { this.ready ? this.tell(data) : this.waiting.push(data); }
    terminate() { this.inside.frameElement.remove(); }
  };
}
