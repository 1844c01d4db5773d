"""The embedded stack: `signal up|down|status|keys|doctor`, and the supervisor behind them.

Starts and stops processes and keeps their secrets; nothing here answers requests. May import gpu_pool,
workers.{queue,catalogue,settings} and the services of web; nothing else in web imports this package.
"""
