"""A page that shows what an engine and its cache are doing: read-only, offline, one router."""

from prefixstore.dashboard.router import dashboard_router

__all__ = ["dashboard_router"]
