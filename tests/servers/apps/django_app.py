"""A Django project in one module, as WSGI and as ASGI."""

from __future__ import annotations

import events
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"], SECRET_KEY="for-tests", USE_TZ=True)


def up(request: HttpRequest) -> JsonResponse:
    return JsonResponse({})


def track(request: HttpRequest) -> JsonResponse:
    return JsonResponse(events.track())


async def track_in_the_loop(request: HttpRequest) -> JsonResponse:
    return JsonResponse(events.track())


urlpatterns = [path("", up), path("track", track), path("track-in-loop", track_in_the_loop)]
application = get_wsgi_application()
asgi_application = get_asgi_application()
