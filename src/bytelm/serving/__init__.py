"""An HTTP server with the API of OpenAI's completions."""

from bytelm.serving.app import create_app
from bytelm.serving.server import listen, serve
from bytelm.serving.settings import Settings

__all__ = ["Settings", "create_app", "listen", "serve"]
