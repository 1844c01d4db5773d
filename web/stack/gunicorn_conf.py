"""gunicorn's settings for the embedded stack; read by gunicorn itself.

Threads, because most requests are long polls that wait for Redis. The listening socket is the
supervisor's, so a restart of web refuses no connection.
"""

from __future__ import annotations

import os
import resource

from web.admission import MAX_WAITING

_cores = len(os.sched_getaffinity(0))
_waits = int(os.environ.get("SIGNAL_MAX_WAITS") or 200)

bind = f"fd://{os.environ['SIGNAL_LISTENER_FD']}"
worker_class = "gthread"
workers = int(os.environ.get("SIGNAL_WEB_WORKERS") or min(2, max(1, _cores // 4)))
# A long poll holds a thread, and so does a request that waits for its turn (web.admission), such as another
# long poll; some must stay free for everything else.
threads = 2 * _waits + 2 * MAX_WAITING + 56
worker_connections = 4 * threads
# Each connection is an open file, and the usual limit is 1,024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
_wanted = worker_connections + 512
if _soft != resource.RLIM_INFINITY and _soft < _wanted:
    _most = _wanted if _hard == resource.RLIM_INFINITY else min(_wanted, _hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _hard))
keepalive = 75
timeout = 60
# A long poll may last 25 s; stopping must not wait for it.
graceful_timeout = 2
# GET /futures?ids=… carries many ids.
limit_request_line = 8190
control_socket_disable = True
# gunicorn's own heartbeat files; the default folder may be on a slow disk.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
errorlog = "-"
accesslog = None
proc_name = "signal-web"
