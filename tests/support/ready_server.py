"""A child for supervisor tests: answers /ready with 200, and does one odd thing if told.

python ready_server.py PORT [stubborn | grandchild | silent | status N]
"""

import http.server
import signal
import subprocess
import sys
import time


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main() -> None:
    port, *manner = sys.argv[1:]
    if "status" in manner:
        sys.stderr.write("cannot go on\n")
        sys.exit(int(manner[-1]))
    if "stubborn" in manner:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "grandchild" in manner:
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stderr.write(f"grandchild {grandchild.pid}\n")
    if "silent" in manner:
        time.sleep(600)
    sys.stderr.write("serving\n")
    http.server.HTTPServer(("127.0.0.1", int(port)), _Ready).serve_forever()


if __name__ == "__main__":
    main()
